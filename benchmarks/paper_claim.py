"""The paper's claim, tried out: is a small network cut out of a large one better than the same one trained plainly?

    python -m benchmarks.paper_claim --quick --json             # half of the demo model, one seed; under ten minutes
    python -m benchmarks.paper_claim --parent b1 runs/demo_b1 demo --parent deit runs/demo_deit demo    # three seeds

`--parent NAME FOLDER DATA` names a trained network; `benchmarks/checkpoints.py` makes such folders. From each, a
smaller standard shape is made in three ways, and each is trained for the same number of epochs on the same images by
the same recipe (`toolchain.distill`), at two learning rates of which the better one counts:

- `pruned`: cut out of the parent with closed-form compensation, then distilled from it;
- `distilled`: the same shape with random weights, distilled from the same parent;
- `scratch`: the same shape with random weights, trained on the labels alone.

A PVTv2-B1 becomes a PVTv2-B0; other networks lose half of every width. The parent's own training is in nobody's
budget, as in the paper, whose parents are downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import record
from benchmarks.train_demo import initialise
from upvits import toolchain
from upvits.calib_data import DataSource, open_data, proxy_images
from upvits.calib_data.datasets import Images
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import proxy_set
from upvits.toolchain import DistillSettings, PruningPlan
from upvits.toolchain.compensation import compress
from upvits.toolchain.families import family_of, narrow
from upvits.toolchain.structure.timm_config import architecture_of, config_of, num_classes_of, update_config

WAYS = ("pruned", "distilled", "scratch")
SMALLER = {"pvt_v2_b1": "pvt_v2_b0", "pvt_v2_b2": "pvt_v2_b1"}
RATES = (1e-3, 4e-3)  # at a batch of 256


@dataclass(frozen=True, slots=True)
class Trial:
    """One parent and one seed. `data` holds the training images of the budget and the validation images."""

    name: str
    parent: nn.Module
    plan: PruningPlan
    data: DataSource
    settings: DistillSettings
    calib_images: int


def plan_for(parent: nn.Module, data: DataSource, images: int, seed: int) -> PruningPlan:
    """To the published smaller shape of the same depth where there is one, otherwise to half of every width."""
    pictures = proxy_images(data, toolchain.preprocess_of(parent), images, seed)
    scores = toolchain.score(parent, pictures, method="fisher", seed=seed)
    smaller = SMALLER.get(architecture_of(parent))
    if smaller is None:
        return toolchain.plan(parent, scores, ratio=0.5)
    like = toolchain.create_model(
        smaller,
        weights="random",
        num_classes=num_classes_of(parent),
        image_size=toolchain.preprocess_of(parent).input_size[1],
    )
    return toolchain.plan(parent, scores, like=like)


def untrained(parent: nn.Module, plan: PruningPlan) -> nn.Module:
    """The plan's shape as timm builds it, with `train_demo`'s start; draws from torch's global generator.

    Raises:
        UserError: stock timm cannot build these widths.
    """
    shape = narrow(parent, plan.widths)
    family = family_of(shape)
    widths = family.uniform_args(shape)
    if widths is None:
        raise UserError("The plan is not of a shape that timm builds, so nobody would train it from scratch.")
    args = {**family.constructor_args(shape), **widths}
    name = plan.architecture or architecture_of(parent)
    model = cast(nn.Module, timm.create_model(name, num_classes=num_classes_of(parent), **args))
    kept = {key: value for key, value in config_of(parent).items() if key != "architecture"}
    update_config(model, **kept, architecture=name)
    initialise(model)
    return model


def student(trial: Trial, way: str) -> nn.Module:
    """The small network before its training."""
    seed = trial.settings.seed
    if way == "pruned":
        preprocess = toolchain.preprocess_of(trial.parent)
        return compress(trial.parent, trial.plan, proxy_images(trial.data, preprocess, trial.calib_images, seed)).model
    torch.manual_seed(seed)
    return untrained(trial.parent, trial.plan)


def recipe(settings: DistillSettings, way: str, rate: float) -> DistillSettings:
    """The same for all, but that `scratch` learns nothing from the parent's answers."""
    return replace(settings, lr=rate, logit_weight=0.0 if way == "scratch" else settings.logit_weight)


def first(images: Images, count: int) -> Images:
    """The first `count` of an ordered set."""
    return Images(images.labels[:count], lambda index: images[index][0])


def measure(trial: Trial, way: str, rate: float, *, quiet: bool) -> dict[str, Any]:
    """Makes, trains and judges one network."""
    started = time.perf_counter()
    small = student(trial, way)
    preprocess = toolchain.preprocess_of(trial.parent)
    result = toolchain.distill(
        small, trial.parent, trial.data, preprocess, recipe(trial.settings, way, rate), quiet=quiet
    )
    return {
        "parent": trial.name,
        "way": way,
        "lr": rate,
        "seed": trial.settings.seed,
        "top1": result.history[-1].top1,
        "macs": toolchain.count_macs(result.model, preprocess.input_size),
        "params": toolchain.count_params(result.model),
        "seconds": round(time.perf_counter() - started, 1),
    }


def rows_of(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every parent, seed, way and learning rate."""
    for name, folder, spec in asked.parent or [("pvt_v2_b0 (demo)", "demo", "demo")]:
        parent = toolchain.create_model("pvtv2_b0", weights="demo") if folder == "demo" else toolchain.load(folder)
        source = open_data(spec)
        for seed in range(asked.seeds):
            train = proxy_set(source, asked.images, seed) if asked.images else source.train
            data = replace(source, train=train, val=first(source.val, asked.eval_images))
            settings = DistillSettings(
                epochs=asked.epochs,
                batch_size=32,
                warmup_epochs=min(2.0, asked.epochs / 5),
                drop_path=None,
                ema_decay=0.995,
                eval_every=asked.epochs,
                seed=seed,
            )
            plan = plan_for(parent, data, asked.score_images, seed)
            trial = Trial(name, parent, plan, data, settings, asked.calib_images)
            for way in WAYS:
                for rate in RATES:
                    row = measure(trial, way, rate, quiet=asked.quiet)
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    yield row


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """For each parent and way the rows of the learning rate with the highest mean top-1."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in dict.fromkeys((row["parent"], row["way"]) for row in rows):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in rows:
            if (row["parent"], row["way"]) == key:
                by_rate.setdefault(row["lr"], []).append(row)
        found[key] = max(by_rate.values(), key=lambda group: mean(row["top1"] for row in group))
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal: the better learning rate of each way, mean over the seeds."""
    shown = Table("parent", "way", "top-1 %", "lr", "MACs (M)", "parameters (M)", "s")
    for (parent, way), group in best_rates(rows).items():
        sizes = f"{group[0]['macs'] / 1e6:.1f}", f"{group[0]['params'] / 1e6:.2f}"
        top1, seconds = (
            record.spread([row[key] for row in group], digits) for key, digits in (("top1", 1), ("seconds", 0))
        )
        shown.add_row(parent, way, top1, f"{group[0]['lr']:g}", *sizes, seconds)
    return shown


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", nargs=3, action="append", metavar=("NAME", "FOLDER", "DATA"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int, help="training images of the budget; 0: all")
    parser.add_argument("--eval-images", type=int)
    parser.add_argument("--score-images", type=int)
    parser.add_argument("--calib-images", type=int)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "paper_claim.json")
    parser.add_argument("--json", action="store_true", help="end stdout with the document")
    parser.add_argument("--quiet", action="store_true")
    asked = parser.parse_args()
    full = {"seeds": 3, "epochs": 20, "images": 0, "eval_images": 5000, "score_images": 256, "calib_images": 512}
    quick = {"seeds": 1, "epochs": 4, "images": 960, "eval_images": 600, "score_images": 64, "calib_images": 256}
    for name, value in (quick if asked.quick else full).items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    try:
        rows = list(rows_of(asked))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    best = [
        {"parent": parent, "way": way, "lr": group[0]["lr"], "top1": mean(row["top1"] for row in group)}
        for (parent, way), group in best_rates(rows).items()
    ]
    found = record.document({name: getattr(asked, name) for name in full}, rows, best=best)
    record.write(asked.out, found)
    Console(stderr=asked.json, width=120).print(table(rows))
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
