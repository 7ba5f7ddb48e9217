"""How much of the saved arithmetic becomes saved time: latency gain over MACs gain, for every plan and runtime here.

    python -m benchmarks.realised_speed                  # the demo model and DeiT-T's shape, 0.65 and 0.5 of the MACs
    python -m benchmarks.realised_speed --quick --json   # the demo model at half its MACs; under ten minutes
    python -m benchmarks.realised_speed --model vit_s14 runs/vit_s14 imagefolder:photos

1.0 means that latency fell as far as the MACs did. All networks of a runtime are timed in turns in one process; gains
are medians over rounds of ratios within a round, with their 10th and 90th percentile. Nothing is trained: latency
depends on shapes alone, and scores only decide which shapes the global planner chooses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import record
from upvits import toolchain
from upvits.calib_data import open_data, proxy_images
from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import watched
from upvits.deploy.measure.bench import BenchSettings
from upvits.deploy.runtimes import RUNTIMES, BatchProfile
from upvits.deploy.speed.deployment import Deployment, measure, opened
from upvits.toolchain.planning import DEFAULT_COMPONENTS, Component, Planner, PruningPlan, Size

CPU_RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to plan: with which planner, widths aligned to what, and whether blocks leave.

    With the uniform planner a quarter of them does (`DEPTH_RATIO`); the global one decides on its own.
    """

    name: str
    planner: Planner
    align: int
    depth: bool


WAYS = (
    Way("uniform", "uniform", 8, False),
    Way("uniform, align 1", "uniform", 1, False),
    Way("uniform, depth", "uniform", 8, True),
    Way("global", "global", 8, False),
    Way("global, align 1", "global", 1, False),
    Way("global, depth", "global", 8, True),
)
DEPTH_RATIO = 0.25


@dataclass(frozen=True, slots=True)
class Network:
    """A dense network and what it is scored on."""

    name: str
    model: nn.Module
    images: Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """A network that a plan leaves."""

    way: Way
    share: float
    model: nn.Module
    plan: PruningPlan


def demo(num_images: int) -> Network:
    """The demo model with its own images."""
    model = toolchain.create_model("pvtv2_b0", weights="demo")
    return Network("pvt_v2_b0 demo", model, _images("demo", model, num_images))


def deit_shape(num_images: int) -> Network:
    """DeiT-T at 224 pixels with random weights, scored on noise: its scores mean nothing, its shapes are real."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = toolchain.create_model("deit_tiny", weights="random", num_classes=100, image_size=224)
        images = torch.randn(min(num_images, 8), 3, 224, 224)
    return Network("deit_tiny 224 px, random weights", model, images)


def _images(data: str, model: nn.Module, num_images: int) -> Tensor:
    return proxy_images(open_data(data, quiet=True), toolchain.preprocess_of(model), num_images, seed=0).read()


def cuts_of(network: Network, shares: Sequence[float], quiet: bool) -> Iterator[Cut]:
    """Every way at every share of the MACs; a way that cannot reach a share is left out, and it is said why."""
    scores = toolchain.score(network.model, network.images, method="fisher", depth=True, quiet=quiet)
    for share in shares:
        for way in WAYS:
            components: tuple[Component, ...] = DEFAULT_COMPONENTS
            if way.depth and way.planner == "global":
                components = (*DEFAULT_COMPONENTS, "depth")
            try:
                plan = toolchain.plan(
                    network.model,
                    scores,
                    target_macs=share,
                    planner=way.planner,
                    align=way.align,
                    components=components,
                    depth_ratio=DEPTH_RATIO if way.depth and way.planner == "uniform" else None,
                )
            except UserError as error:
                Console(stderr=True).print(f"{network.name}, {way.name} at {share:g}: {error.what}", highlight=False)
                continue
            yield Cut(way, share, toolchain.delete_units(network.model, plan), plan)


def measure_network(
    network: Network, cuts: Sequence[Cut], runtime: str, batch: int, seconds: float
) -> list[dict[str, Any]]:
    """Rows of one network on one runtime: all of its cuts and the dense network, timed in turns."""
    deployment = Deployment(RUNTIMES[runtime], "fp32", batch, BatchProfile(1, batch, batch))
    preprocess = toolchain.preprocess_of(network.model)
    networks = {"dense": (network.model, preprocess)}
    networks |= {f"{number}": (cut.model, preprocess) for number, cut in enumerate(cuts)}
    with opened(deployment, networks) as sessions:
        settings = BenchSettings(seconds=seconds * len(sessions), rounds=12, min_iterations=24)
        report = measure(sessions, dict.fromkeys(sessions, preprocess.input_size), deployment, settings)
    return [
        {
            "network": network.name,
            "runtime": runtime,
            "precision": "fp32",
            "batch": batch,
            "plan": cut.way.name,
            "planner": cut.way.planner,
            "align": cut.way.align,
            "blocks": sum(map(len, cut.plan.blocks.values())) if cut.plan.blocks else None,
            "macs_share": cut.plan.after.macs / cut.plan.before.macs,
            "dense_ms": report.stats["dense"][batch].median,
            "ms": report.stats[f"{number}"][batch].median,
            **gains(cut.plan.before, cut.plan.after, report.ratio("dense", f"{number}", batch).median),
            "low": report.ratio("dense", f"{number}", batch).low,
            "high": report.ratio("dense", f"{number}", batch).high,
            "asked_share": cut.share,
        }
        for number, cut in enumerate(cuts)
    ]


def gains(before: Size, after: Size, speedup: float) -> dict[str, float]:
    """Gain in MACs, gain in latency, and the second over the first."""
    macs_gain = before.macs / after.macs
    return {"macs_gain": macs_gain, "speedup": speedup, "realised": speedup / macs_gain}


def runtimes_here() -> list[str]:
    """CPU runtimes that work on this machine, and those of its GPU where there is one."""
    usable = [name for name, runtime in RUNTIMES.items() if runtime.missing_to_run() is None]
    usable = [name for name in usable if RUNTIMES[name].missing_to_build() is None and name != "openvino-gpu"]
    return [name for name in usable if name in CPU_RUNTIMES or not RUNTIMES[name].on_cpu]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as people read them."""
    shown = Table("network", "runtime", "batch", "plan", "MACs", "MACs gain", "faster", "range", "realised")
    for row in rows:
        figures = (f"{row['macs_share']:.2f}", f"{row['macs_gain']:.2f}x", f"{row['speedup']:.2f}x")
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        place = (row["network"], row["runtime"], str(row["batch"]), row["plan"])
        shown.add_row(*place, *figures, spread, f"{row['realised']:.2f}")
    return shown


def networks_of(asked: argparse.Namespace) -> Iterator[Network]:
    """The networks that were asked for; the demo model alone with `--quick`."""
    for name, folder, data in asked.model or ():
        model = toolchain.load(Path(folder))
        yield Network(name, model, _images(data, model, asked.images))
    if not asked.model:
        yield demo(asked.images)
        if not asked.quick:
            yield deit_shape(asked.images)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs=3, action="append", metavar=("NAME", "FOLDER", "DATA"))
    parser.add_argument("--images", type=int, default=None, help="for scoring; default 64, with --quick 16")
    parser.add_argument("--batches", type=int, nargs="+", default=None, help="default 1 8, with --quick 8")
    parser.add_argument("--seconds", type=float, default=None, help="per network; default 4, with --quick 1")
    parser.add_argument("--runtimes", nargs="+", default=None, help="default: all that work here")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "realised_speed.json")
    asked = parser.parse_args()
    asked.images = asked.images or (16 if asked.quick else 64)
    batches = asked.batches or ([8] if asked.quick else [1, 8])
    seconds = asked.seconds or (1.0 if asked.quick else 4.0)
    rows: list[dict[str, Any]] = []
    for network in networks_of(asked):
        cuts = list(cuts_of(network, (0.5,) if asked.quick else (0.65, 0.5), quiet=asked.json))
        places = [(runtime, batch) for runtime in asked.runtimes or runtimes_here() for batch in batches]
        for runtime, batch in watched(places, f"timing {network.name}", quiet=asked.json):
            rows += measure_network(network, cuts, runtime, batch, seconds)
    settings = {"images": asked.images, "batches": batches, "seconds": seconds, "quick": asked.quick}
    content = record.document(settings, rows)
    record.write(asked.out, content)
    Console(width=120, stderr=asked.json).print(table(rows))
    if asked.json:
        json.dump(content, sys.stdout)
        print()


if __name__ == "__main__":
    main()
