"""What is left right after pruning, at equal MACs: every way of ours, the peers, and random choice.

    python -m benchmarks.one_shot                                       # the demo model, all levels, three seeds
    python -m benchmarks.one_shot --quick --json                        # two levels, one seed; under ten minutes
    python -m benchmarks.one_shot --model vit_s14 runs/vit_s14 imagefolder:photos --peers runs/peers/bin/python

`--model NAME FOLDER DATA` may be repeated; `benchmarks/checkpoints.py` makes such folders. Every network is cut by the
same surgery and its MACs are counted on the result. Widths are not aligned (`align` 1 for everybody), so that each
method gets as close to the level as it can; `realised_speed` is about what hardware makes of widths. The fine-tune is
the same short distillation for all. The peers' environment is made as `benchmarks/peers.py` says.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import peers, record
from upvits import toolchain
from upvits.calib_data import DataSource, batches, open_data, proxy_images
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import proxy_set
from upvits.toolchain import DistillSettings, PruningPlan, Scores
from upvits.toolchain.compensation import compensated_curves, compress, weigh_streams, with_joint_units
from upvits.toolchain.planning import Curve, plan_by_scores
from upvits.toolchain.scores import divergence

SHARES = (0.8, 0.65, 0.5, 0.35)
QUICK_SHARES = (0.65, 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A dense network and everything that the methods are given: all get the same images.

    Attributes:
        images: calibration images [N, 3, H, W]; labels [N] are for the peers, whose criteria want them.
        score_images: how many of them scores (and the peers' gradients) are measured on.
        val: validation images in batches, prepared once, with their labels [V] and the dense network's logits [V, C].
    """

    checkpoint: str
    model: nn.Module
    source: DataSource
    images: Tensor
    labels: Tensor
    score_images: int
    val: tuple[Tensor, ...]
    val_labels: Tensor
    logits: Tensor
    shares: tuple[float, ...]
    seed: int


Made = tuple[nn.Module, float]
Method = Callable[[Task, float], Made]
"""From a task and a share of the MACs to a network and the seconds that it took to choose and make it."""


PLANNERS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "global": {"planner": "global"},
    "global, q·k and v apart": {"planner": "global", "components": ("embed", "qk_v", "ffn")},
    "global, depth too": {"planner": "global", "components": ("embed", "attention", "ffn", "depth")},
}
"""By the name in the table, what `toolchain.plan` is asked for."""


INFORMED = ("fisher", "refined", "kl")
"""Scores in nats, which all planners and compensation can use."""


@functools.cache
def scores_of(task: Task, method: str, depth: bool) -> tuple[Scores, float]:
    """Measured once for all levels; the seconds are added to every network that uses them."""
    started = time.perf_counter()
    images = task.images[: task.score_images]
    scores = toolchain.score(task.model, images, method=method, depth=depth, seed=task.seed)  # type: ignore[arg-type]
    return scores, time.perf_counter() - started


@functools.cache
def curves_of(task: Task) -> tuple[dict[str, Curve], float]:
    """Expected losses after compensation, for the planner that weighs groups against each other."""
    started = time.perf_counter()
    return compensated_curves(task.model, task.images, seed=task.seed), time.perf_counter() - started


def ours(task: Task, share: float, *, scores: str, planner: str, compensate: bool) -> Made:
    """A criterion, a planner, and deletion or closed-form compensation."""
    asked = dict(PLANNERS[planner])
    found, before = scores_of(task, scores, "depth" in asked.get("components", ()))
    curves = None
    if compensate:
        curves, more = curves_of(task)
        before += more
    started = time.perf_counter()

    def plan_by(own: Mapping[str, Curve] | None) -> PruningPlan:
        more = {"curves": own, **asked} if asked else {}
        return plan_by_scores(task.model, found, target_macs=share, align=1, **more)

    if curves is not None and asked:
        curves = weigh_streams(task.model, task.images, curves, plan_by)
    plan = plan_by(curves)
    if curves is None:
        network = toolchain.delete_units(task.model, plan)
    else:
        plan = with_joint_units(plan, curves) if scores == "fisher" else plan  # as the tool does
        network = compress(task.model, plan, task.images).model
    return network, before + time.perf_counter() - started


@functools.cache
def peer_plans(task: Task, name: str, python: Path) -> tuple[dict[float, PruningPlan], float]:
    """One process of the peer answers for all levels."""
    count = task.score_images
    return peers.plans(python, task.model, task.images[:count], task.labels[:count], name, task.shares, task.seed)


def peer(task: Task, share: float, *, name: str, python: Path) -> Made:
    """What another tool chooses, cut by our surgery."""
    plans, seconds = peer_plans(task, name, python)
    return toolchain.delete_units(task.model, plans[share]), seconds


def methods(quick: bool, python: Path | None) -> dict[str, Method]:
    """By the name in the table; what has no chance in it is named in `WITHOUT_CHANCE`."""
    found: dict[str, Method] = {}
    for scores in ["random", "magnitude", *(INFORMED[:1] if quick else INFORMED)]:
        for planner in PLANNERS if scores in INFORMED else ("uniform",):
            for compensate in (False, True) if scores in INFORMED else (False,):
                name = f"{scores}, {planner}{', compensated' if compensate else ''}"
                found[name] = functools.partial(ours, scores=scores, planner=planner, compensate=compensate)
    if python is None:
        return found
    for name in peers.PEERS:
        found[name] = functools.partial(peer, name=name, python=python)
    return found


WITHOUT_CHANCE = ("magnitude, uniform", "Torch-Pruning, magnitude")


def make_task(name: str, model: nn.Module, source: DataSource, asked: argparse.Namespace, seed: int) -> Task:
    """Images drawn with `seed`; validation is the same for all seeds."""
    preprocess = toolchain.preprocess_of(model)
    chosen = list(batches(source.val, preprocess, 64))
    val = tuple(images for images, _ in chosen)[: -(-asked.eval_images // 64)]
    return Task(
        checkpoint=name,
        model=model,
        source=source,
        images=proxy_images(source, preprocess, asked.calib_images, seed).read(),
        labels=torch.tensor(proxy_set(source, asked.calib_images, seed).labels),
        score_images=asked.score_images,
        val=val,
        val_labels=torch.cat([labels for _, labels in chosen])[: sum(len(images) for images in val)],
        logits=logits_of(model, val),
        shares=tuple(asked.shares),
        seed=seed,
    )


def logits_of(model: nn.Module, val: Sequence[Tensor]) -> Tensor:
    """[images, classes], in eval mode."""
    with torch.inference_mode():
        return torch.cat([model.eval()(images) for images in val]).clone()


def judge(task: Task, network: nn.Module) -> dict[str, float]:
    """Top-1 and agreement with the dense network in percent, KL to it in nats, on the validation images."""
    logits = logits_of(network, task.val)
    found = logits.argmax(1)
    return {
        "top1": 100 * float((found == task.val_labels).double().mean()),
        "agreement": 100 * float((found == task.logits.argmax(1)).double().mean()),
        "kl": float(divergence(task.logits, logits).mean()),
    }


def finetuned(task: Task, network: nn.Module, images: int, epochs: int) -> float | None:
    """Top-1 after the same short distillation for every method; None where none was asked for."""
    if not images or not epochs:
        return None
    data = replace(task.source, train=proxy_set(task.source, images, seed=1000 + task.seed))
    settings = DistillSettings(
        epochs=epochs,
        batch_size=32,
        warmup_epochs=0.2,
        drop_path=None,
        ema_decay=0.99,
        eval_every=epochs,
        seed=task.seed,
    )
    result = toolchain.distill(network, task.model, replace(data, val=proxy_set(data, 1, 0)),
                               toolchain.preprocess_of(task.model), settings)  # fmt: skip
    return judge(task, result.model)["top1"]


def measure(task: Task, name: str, method: Method, share: float, asked: argparse.Namespace) -> dict[str, Any]:
    """One row. A method that fails gives a row that says why."""
    row: dict[str, Any] = {"checkpoint": task.checkpoint, "method": name, "level": share, "seed": task.seed}
    try:
        network, seconds = method(task, share)
    except UserError as error:
        empty = dict.fromkeys(("macs_share", "top1", "agreement", "kl", "top1_after_finetune", "seconds"))
        return {**row, **empty, "failed": error.what}
    size = toolchain.preprocess_of(task.model).input_size
    return {
        **row,
        "macs_share": toolchain.count_macs(network, size) / toolchain.count_macs(task.model, size),
        **judge(task, network),
        "top1_after_finetune": finetuned(task, network, asked.finetune_images, asked.finetune_epochs),
        "seconds": seconds,
    }


def rows_of(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows, in the order in which they are measured; the dense networks come first, as method `dense`."""
    known, before = methods(asked.quick, asked.peers), rows_before(asked.rows)
    if asked.only:
        known = {name: known[name] for name in known if any(fnmatch(name, pattern) for pattern in asked.only)}
    if not known:
        raise UserError(f"No method is called {' or '.join(asked.only)}.")
    for name, folder, data in asked.model or [("pvt_v2_b0", "demo", "demo")]:
        model = toolchain.create_model("pvtv2_b0", weights="demo") if folder == "demo" else toolchain.load(folder)
        source = open_data(data)
        for seed in range(asked.seeds):
            task = make_task(name, model, source, asked, seed)
            if seed == 0:
                yield {"checkpoint": name, "method": "dense", "level": 1.0, "seed": 0, "macs_share": 1.0,
                       **judge(task, model), "top1_after_finetune": None, "seconds": 0.0}  # fmt: skip
            todo = [
                (share, method)
                for share in asked.shares
                for method in known
                if not seed or method not in WITHOUT_CHANCE
            ]
            for share, method in todo:
                row = before.get((name, method, share, seed)) or measure(task, method, known[method], share, asked)
                print(json.dumps(row), file=sys.stderr, flush=True)
                yield row


def rows_before(path: Path | None) -> dict[tuple[str, str, float, int], dict[str, Any]]:
    """Rows that another run of the same settings printed before it was stopped."""
    lines = path.read_text().splitlines() if path is not None else []
    rows = [json.loads(line) for line in lines if line.startswith('{"checkpoint"')]
    return {(row["checkpoint"], row["method"], row["level"], row["seed"]): row for row in rows}


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """Rows of all seeds by checkpoint, level and method, in the order of the first."""
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["checkpoint"], row["level"], row["method"]), []).append(row)
    return found


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For every checkpoint and level, who has the highest top-1 right after pruning, and by how much over whom."""
    found = []
    by_method = grouped([row for row in rows if row["top1"] is not None and row["method"] != "dense"])
    for checkpoint, level in dict.fromkeys((name, level) for name, level, _ in by_method):
        top1 = {m: mean(r["top1"] for r in g) for (c, s, m), g in by_method.items() if (c, s) == (checkpoint, level)}
        others = {method: value for method, value in top1.items() if method in peers.PEERS}
        best = max(top1, key=lambda method: top1[method])
        line = f"{checkpoint} at {level:g} of the MACs: {best} is first with {top1[best]:.1f} %"
        if others:
            rival = max(others, key=lambda method: others[method])
            own = max(value for method, value in top1.items() if method not in others)
            line += f"; the best peer is {rival} with {others[rival]:.1f} %, ours has {own:.1f} %"
        found.append(line + ".")
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal: means over the seeds."""
    columns = {"macs_share": 3, "top1": 1, "agreement": 1, "kl": 3, "top1_after_finetune": 1, "seconds": 0}
    titles = ("MACs", "top-1 %", "agreement %", "KL", "fine-tuned %", "s")
    shown = Table("checkpoint", "level", "method", *titles)
    for (checkpoint, level, method), group in grouped(rows).items():
        failed = group[0].get("failed")
        cells = [record.spread([row[column] for row in group], digits) for column, digits in columns.items()]
        shown.add_row(checkpoint, f"{level:g}", f"{method}: {failed}" if failed else method, *cells)
    return shown


def settings_of(asked: argparse.Namespace) -> dict[str, Any]:
    names = ("seeds", "shares", "score_images", "calib_images", "eval_images", "finetune_images", "finetune_epochs")
    return {name: getattr(asked, name) for name in names}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs=3, action="append", metavar=("NAME", "FOLDER", "DATA"))
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="interpreter of the peers' environment")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="methods by name, e.g. 'fisher, *'")
    parser.add_argument("--shares", type=float, nargs="+")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--score-images", type=int)
    parser.add_argument("--calib-images", type=int)
    parser.add_argument("--eval-images", type=int)
    parser.add_argument("--finetune-images", type=int)
    parser.add_argument("--finetune-epochs", type=int, help="0: no fine-tune")
    parser.add_argument("--rows", type=Path, help="stderr of a run that was stopped: its rows are not measured again")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "one_shot.json")
    parser.add_argument("--json", action="store_true", help="end stdout with the document")
    asked = parser.parse_args()
    defaults = {"shares": SHARES, "seeds": 3, "score_images": 256, "calib_images": 512, "eval_images": 5000,
                "finetune_images": 1024, "finetune_epochs": 2}  # fmt: skip
    quick = {"shares": QUICK_SHARES, "seeds": 1, "score_images": 64, "calib_images": 256, "eval_images": 640,
             "finetune_images": 256, "finetune_epochs": 1}  # fmt: skip
    for name, value in (quick if asked.quick else defaults).items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    if asked.peers is None and peers.DEFAULT_PYTHON.exists():
        asked.peers = peers.DEFAULT_PYTHON
    try:
        rows = list(rows_of(asked))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    found = record.document(
        settings_of(asked), rows, peers=peers.versions(asked.peers) if asked.peers else {}, verdicts=verdicts(rows)
    )
    record.write(asked.out, found)
    console = Console(stderr=asked.json, width=150)
    console.print(table(rows), *found["verdicts"], sep="\n")
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
