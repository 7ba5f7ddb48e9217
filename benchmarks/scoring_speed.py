"""What importance scores cost, and what the cheaper ones are worth: the published procedure, kl, refined, fisher.

python -m benchmarks.scoring_speed --quick                  # under 10 minutes on two cores
python -m benchmarks.scoring_speed --model-dir DIR --data SPEC   # ranks on this network too

python -m benchmarks.scoring_speed --deit-b-memory              # only: fisher at DeiT-B size, 32, 64 and 256 images

Costs are measured on networks of DeiT's sizes with random weights, on a sample of the units, and extrapolated to all
units of the network: totals are that, not measurements. Ranks are measured on trained networks, on all units of the
groups that are named: the demo PVTv2-B0, and the network of --model-dir. With --quick, every fourth group is ranked,
and what kl costs on all of them is extrapolated from a sample of the units.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import record
from benchmarks.published import published_kl
from upvits import toolchain
from upvits.calib_data import open_data, proxy_images
from upvits.toolchain.families import groups_of
from upvits.toolchain.scores.cuts import cut_of
from upvits.toolchain.scores.divergence import output_scale
from upvits.toolchain.scores.exact import Units, exact_kl
from upvits.toolchain.scores.fisher import fisher
from upvits.toolchain.scores.refined import refined
from upvits.toolchain.scores.stability import kept_overlap, spearman
from upvits.toolchain.structure.groups import ChannelGroup

SIZES = {
    "DeiT-T, 224 px": ("deit_tiny_patch16_224", 224, 8),
    "DeiT-S, 112 px": ("deit_small_patch16_224", 112, 16),
    "DeiT-S, 224 px": ("deit_small_patch16_224", 224, 8),
    "DeiT-B, 224 px": ("deit_base_patch16_224", 224, 4),
}
"""Shown name -> (timm architecture, image size, images measured)."""


SAMPLED = 160
"""Units that the cost of kl on a whole network is extrapolated from where not all are measured."""


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call, of all threads together: other work on the machine does not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


def spread(groups: Sequence[ChannelGroup], count: int) -> dict[str, list[int]]:
    """`count` units at equal distances in the list of all units, so that every depth has its share."""
    units = [(group.name, unit) for group in groups for unit in range(group.size)]
    step = len(units) / count
    chosen: dict[str, list[int]] = {}
    for i in range(count):
        name, unit = units[int((i + 0.5) * step)]
        chosen.setdefault(name, []).append(unit)
    return chosen


def costs(shown: str, num_units: int, rounds: int) -> dict[str, Any]:
    """Seconds per image and unit of each method on a DeiT with random weights; in turns, medians over rounds."""
    architecture, pixels, count = SIZES[shown]
    torch.manual_seed(0)
    model = timm.create_model(architecture, img_size=pixels).eval()
    # the paper's components; separate q·k and v dims are ours, and `fisher` has them from the same pass
    groups = [group for group in groups_of(model) if group.kind not in ("qk", "v")]
    images = torch.randn(count, 3, pixels, pixels)
    units, batches, total = spread(groups, num_units), [images], sum(group.size for group in groups)
    few = spread(groups, max(2, num_units // 6))
    taken: dict[str, list[float]] = {"published": [], "kl": [], "walk": [], "fisher": []}
    for _ in range(rounds):
        taken["published"].append(seconds(lambda: published_kl(model, images, few, count)) / _size(few))
        taken["walk"].append(seconds(lambda: exact_kl(model, groups, batches, None, {}, count, True)))
        taken["kl"].append(seconds(lambda: exact_kl(model, groups, batches, None, units, count, True)))
        taken["fisher"].append(
            seconds(lambda: fisher(model, groups, images, None, batch_size=count, seed=0, quiet=True))
        )
    walk = median(taken["walk"])  # dense outputs and streams: once per image, however many units there are
    per_unit = {
        "published": median(taken["published"]) / count,
        "kl": ((median(taken["kl"]) - walk) / num_units + walk / total) / count,
        "fisher": median(taken["fisher"]) / total / count,
    }
    return {
        "network": shown, "units": total, "images_measured": count, "units_measured": num_units, "rounds": rounds,
        "seconds_per_image_and_unit": per_unit,
        "extrapolated_hours_256_images": {name: cost * total * 256 / 3600 for name, cost in per_unit.items()},
        "kl_speedup": per_unit["published"] / per_unit["kl"],
        "fisher_speedup": per_unit["published"] / per_unit["fisher"],
    }  # fmt: skip


def _size(units: Units) -> int:
    return sum(len(chosen) for chosen in units.values())


def ranks_on(
    shown: str,
    model: nn.Module,
    images: Tensor,
    groups: Sequence[ChannelGroup],
    batch_size: int,
    quiet: bool,
    every: int = 1,
) -> dict[str, Any]:
    """How `fisher` and `refined` of some groups agree with kl of all units of every so many of them; seconds of each,
    for kl extrapolated where groups are left out.
    """
    batches, ranked = torch.split(images, batch_size), groups[::every]
    scale = output_scale(model, batches)
    found: dict[str, dict[str, Tensor]] = {}

    def kl(units: Units) -> dict[str, Tensor]:
        return exact_kl(model, groups, batches, scale, units, batch_size, quiet)

    def run(name: str) -> None:
        if name == "kl":
            found[name] = _means(kl({group.name: range(group.size) for group in ranked}), len(images))
        elif name == "fisher":
            found[name] = _means(
                fisher(model, groups, images, scale, batch_size=batch_size, seed=0, quiet=quiet), len(images)
            )
        else:
            found[name] = refined(
                model, groups, images, scale, seed=0, cuts=None, batch_size=batch_size, rows=batch_size, quiet=quiet
            )[0]

    taken = {name: seconds(lambda: run(name)) for name in ("kl", "fisher", "refined")}  # noqa: B023  run at once
    if every > 1:
        total = sum(group.size for group in groups)
        walk, sampled = seconds(lambda: kl({})), min(SAMPLED, total)
        taken["kl"] = walk + (seconds(lambda: kl(spread(groups, sampled))) - walk) * total / sampled
    rows = [
        {
            "group": group.name, "kind": group.kind, "units": group.size, "method": method,
            "spearman": spearman(found[method][group.name], found["kl"][group.name]),
            "overlap": kept_overlap(found[method][group.name], found["kl"][group.name], cut_of(group, None)),
        }
        for method in ("fisher", "refined") for group in ranked
    ]  # fmt: skip
    return {
        "network": shown, "images": len(images), "groups": len(groups), "groups_ranked": len(ranked), "seconds": taken,
        "refined_cost_share": taken["refined"] / taken["kl"], "rows": rows,
    }  # fmt: skip


def _means(halves: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: sums.sum(dim=0) / count for name, sums in halves.items()}


def summary(measured: list[dict[str, Any]], ranked: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that are asked for: the worst network for speeds and overlaps, medians of rank correlations."""
    rows = [row for result in ranked for row in result["rows"]]
    return {
        "kl_speedup": min(result["kl_speedup"] for result in measured),
        "fisher_speedup": measured[-1]["fisher_speedup"],
        "fisher_speedup_on": measured[-1]["network"],
        "refined_overlap_min": min(row["overlap"] for row in rows if row["method"] == "refined"),
        "refined_cost_share": max(result["refined_cost_share"] for result in ranked),
        "fisher_spearman_median": median(row["spearman"] for row in rows if row["method"] == "fisher"),
        "fisher_overlap_min": min(row["overlap"] for row in rows if row["method"] == "fisher"),
    }


def deit_b_memory(counts: Sequence[int], batch_size: int) -> list[dict[str, float]]:
    """Peak memory and time of `fisher` on a DeiT-B with random weights, each number of images in a process of its own;
    the middle number with every second group left out too: time must not go with the number of units."""
    rows = []
    for count, half in [*((count, False) for count in counts), (counts[1], True)]:
        command = [sys.executable, "-m", "benchmarks.scoring_speed", "--fisher-once", str(count), str(batch_size)]
        done = subprocess.run([*command, str(int(half))], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def fisher_once(count: int, batch_size: int, half: int) -> dict[str, float]:
    """One measurement of `deit_b_memory`, in this process."""
    torch.manual_seed(0)
    model = timm.create_model("deit_base_patch16_224").eval()
    groups = groups_of(model)[:: 2 if half else 1]
    images = torch.randn(count, 3, 224, 224)
    wall = time.perf_counter()
    taken = seconds(lambda: fisher(model, groups, images, None, batch_size=batch_size, seed=0, quiet=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return {
        "images": count, "units": sum(group.size for group in groups), "batch_size": batch_size,
        "peak_rss_gb": peak / 1e9, "cpu_seconds": taken, "wall_seconds": time.perf_counter() - wall,
    }  # fmt: skip


def tables(document: dict[str, Any]) -> list[Table]:
    """For the terminal."""
    cost = Table("network", "published", "kl", "fisher", "kl faster", "fisher faster", title="ms per image and unit")
    for result in document["rows"]:
        figures = [f"{1000 * value:.4g}" for value in result["seconds_per_image_and_unit"].values()]
        cost.add_row(result["network"], *figures, f"{result['kl_speedup']:.1f}x", f"{result['fisher_speedup']:.0f}x")
    rank = Table("network", "group", "units", "method", "Spearman with kl", "kept overlap", title="Ranks")
    for result in document["ranks"]:
        for row in result["rows"]:
            agreement = (f"{row['spearman']:.3f}", f"{row['overlap']:.3f}")
            rank.add_row(result["network"], row["group"], str(row["units"]), row["method"], *agreement)
    return [cost, rank]


def networks(asked: argparse.Namespace) -> list[tuple[str, nn.Module, Tensor, list[ChannelGroup]]]:
    """Trained networks, their images, and the groups whose units are all taken out one by one."""
    model = toolchain.create_model("pvtv2_b0", weights="demo").eval()
    images = proxy_images(open_data("demo"), toolchain.preprocess_of(model), asked.images, 0).read()
    found = [("pvt_v2_b0 (demo)", model, images, list(groups_of(model)))]
    if asked.model_dir is not None:
        model = toolchain.load(asked.model_dir).eval()
        images = proxy_images(open_data(asked.data), toolchain.preprocess_of(model), asked.images, 0).read()
        chosen = [group for group in groups_of(model) if group.name in asked.groups or not asked.groups]
        found.append((asked.model_dir.name, model, images, chosen))
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="proxy images for ranks")
    parser.add_argument("--units", type=int, help="units sampled for costs (48; 12 with --quick)")
    parser.add_argument("--model-dir", type=Path, help="a trained network's folder, for ranks")
    parser.add_argument("--data", default="demo", help="data of --model-dir, e.g. imagefolder:DIR")
    parser.add_argument("--groups", nargs="*", default=[], help="groups of --model-dir to rank; all by default")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="under 10 minutes on two cores")
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "scoring_speed.json")
    parser.add_argument("--deit-b-memory", action="store_true", help="measure memory and time of fisher, nothing else")
    parser.add_argument("--fisher-once", type=int, nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.fisher_once is not None:
        print(json.dumps(fisher_once(*asked.fisher_once)))
        return
    if asked.deit_b_memory:
        rows = deit_b_memory((32, 64, 256), 8)
        record.write(
            asked.out.with_name("fisher_memory.json"), record.document({"network": "DeiT-B, 224 px, random"}, rows)
        )
        return
    num_units, rounds = asked.units or (12 if asked.quick else 48), 1 if asked.quick else 3
    measured = [costs(shown, num_units, rounds) for shown in SIZES]
    ranked = [
        ranks_on(shown, model, images, groups, asked.batch_size, asked.json, every=4 if asked.quick else 1)
        for shown, model, images, groups in networks(asked)
    ]
    settings = {"images": asked.images, "units": num_units, "rounds": rounds, "quick": asked.quick}
    document = {**record.document(settings, measured, **summary(measured, ranked)), "ranks": ranked}
    record.write(asked.out, document)
    console = Console(width=120, file=sys.stderr if asked.json else sys.stdout)
    for table in tables(document):
        console.print(table)
    if asked.json:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
