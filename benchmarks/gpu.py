"""The first minutes on an NVIDIA GPU: is CUDA right, is the pruned network faster, and what does the work cost?

    python -m benchmarks.gpu --minutes 10

In this order, and what is measured is saved at once, so that a run may end at any moment. (a) Scores, plan, cut, refit
and fine-tuning on CUDA against the CPU. (b) Dense against pruned in PyTorch, ONNX Runtime and TensorRT; weights are
random, since latency does not depend on them, the pruned network has half of every width, and the two take turns.
(c) Seconds and memory of large networks, and a sweep over widths. What fails, and what there was no time for, is
recorded with its reason. Results go to benchmarks/results/ as JSON and as a table; `--device cpu --quick` only tries
the script out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from torch import nn

from benchmarks.gpu_evidence import Evidence, Step
from benchmarks.torch_session import TorchSession, TorchWay
from benchmarks.width_sweep import Point, cost_by_alignment, rounding_up_pays, sweep
from upvits import toolchain
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.machine.environment import environment
from upvits.deploy.machine.gpu import compute_capability
from upvits.deploy.machine.gpu_monitor import GpuMonitor
from upvits.deploy.measure.bench import BenchSettings, LatencyStats, interleave
from upvits.deploy.precision import QUANTIZED, calibrate, convert
from upvits.deploy.runtimes import BatchProfile, BuildOptions, RunOptions, Session, runtime_named
from upvits.deploy.runtimes.cuda import missing_gpu
from upvits.deploy.store.artifacts import atomic_write
from upvits.toolchain.networks.names import canonical_name

# the first ones are worth most
MODELS = ("deit_base_patch16_224", "pvt_v2_b2", "deit_small_patch16_224", "pvt_v2_b0", "deit_tiny_patch16_224")
BATCHES = (1, 32, 8, 128)
RATIO = 0.5
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class RuntimeWay:
    """How to run a network in a runtime of `deploy.runtimes`."""

    runtime: str
    precision: str
    cuda_graph: bool = False

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}{' CUDA graph' * self.cuda_graph}"


Way = TorchWay | RuntimeWay

GPU_WAYS: tuple[Way, ...] = (
    RuntimeWay("onnxruntime-cuda", "fp32"),
    RuntimeWay("onnxruntime-cuda", "fp16"),
    RuntimeWay("onnxruntime-cuda", "fp16", cuda_graph=True),
    TorchWay("fp32"),
    TorchWay("fp16"),
    TorchWay("fp16", channels_last=True),
    TorchWay("fp16", cuda_graph=True),
    TorchWay("bf16"),
    TorchWay("fp16", compiled=True),
    TorchWay("fp16", compiled=True, cuda_graph=True),
    TorchWay("bf16", compiled=True, cuda_graph=True),
    RuntimeWay("tensorrt", "fp16", cuda_graph=True),
    RuntimeWay("tensorrt", "int8", cuda_graph=True),
    RuntimeWay("tensorrt", "fp8", cuda_graph=True),
    RuntimeWay("tensorrt", "bf16", cuda_graph=True),
    RuntimeWay("tensorrt", "fp32", cuda_graph=True),
    RuntimeWay("onnxruntime-tensorrt", "fp16", cuda_graph=True),
    RuntimeWay("onnxruntime-cuda", "bf16"),
    RuntimeWay("tensorrt-rtx", "fp16", cuda_graph=True),
    RuntimeWay("tensorrt-rtx", "int8", cuda_graph=True),
)
# The last one needs a GPU: it shows that a failure is recorded.
CPU_WAYS: tuple[Way, ...] = (RuntimeWay("onnxruntime", "fp32"), TorchWay("fp32"), RuntimeWay("tensorrt", "fp16"))


@dataclass(frozen=True, slots=True)
class Row:
    """Dense and pruned in one way at one batch size; `failed` says why there are no figures.

    Times are in ms per batch, host to host. `speedup` is the median over rounds, `low` and `high` the 10th and 90th
    percentile.
    """

    model: str
    way: str
    batch: int
    dense: LatencyStats | None = None
    pruned: LatencyStats | None = None
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    settings: dict[str, str | int | bool] | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Networks:
    """A network, the pruned one, and where their ONNX files are made when they are needed."""

    name: str
    dense: nn.Module
    pruned: nn.Module
    folder: Path

    @property
    def size(self) -> tuple[int, int, int]:
        """Of an image, (channels, height, width)."""
        return toolchain.preprocess_of(self.dense).input_size

    def onnx(self, which: str, precision: str, base_precision: str) -> Path:
        """The ONNX file of "dense" or "pruned" in a precision."""
        path = self.folder / which / f"{precision}-{base_precision}.onnx"
        if not path.exists():
            fp32 = self.folder / which / "fp32.onnx"
            if not fp32.exists():
                model: nn.Module = getattr(self, which)
                export_onnx(model, fp32, toolchain.preprocess_of(model))
            graph = onnx.load(fp32)
            noise = [np.random.default_rng(0).standard_normal((4, *self.size)).astype(np.float32)]
            ranges = calibrate(graph, noise) if precision in QUANTIZED else None
            onnx.save(convert(graph, precision, ranges=ranges, base_precision=base_precision).model, path)
        return path


def make_networks(name: str, folder: Path) -> Networks:
    """A network of random weights and its half."""
    torch.manual_seed(0)
    dense = toolchain.create_model(name, weights="random")
    size = toolchain.preprocess_of(dense).input_size
    plan = toolchain.plan(dense, toolchain.score(dense, method="random"), ratio=RATIO, input_size=size)
    return Networks(name, dense, toolchain.delete_units(dense, plan), folder)


def open_pair(networks: Networks, way: Way, batches: Sequence[int], device: str) -> tuple[Session, Session]:
    """Both networks, loaded in one way.

    Raises:
        UserError: this machine lacks something for it, or it refuses the network.
    """
    if isinstance(way, TorchWay):
        return TorchSession(networks.dense, way, device), TorchSession(networks.pruned, way, device)
    runtime = runtime_named(way.runtime)
    missing = runtime.missing_to_build() or runtime.missing_to_run()
    if missing is not None:
        raise MissingDependencyError(missing.why, fix=missing.fix)
    capability = compute_capability()
    here = (f"sm{capability[0]}{capability[1]}",) if capability and runtime.has_targets else ()
    middle = sorted(batches)[len(batches) // 2]
    options = BuildOptions(way.precision, BatchProfile(min(batches), middle, max(batches)), targets=here)
    sessions = []
    for which in ("dense", "pruned"):
        path = networks.onnx(which, way.precision, runtime.base_precision)
        folder = networks.folder / which / str(way).replace(" ", "-")
        runtime.build(path, folder, options)
        sessions.append(runtime.open(folder, RunOptions(cuda_graph=way.cuda_graph)))
    return sessions[0], sessions[1]


def measure(
    networks: Networks, ways: Sequence[Way], batches: Sequence[int], device: str, settings: BenchSettings,
    in_time: Callable[[], bool],
) -> Iterator[Row]:  # fmt: skip
    """One row for every way and batch size."""
    for way in ways:
        left = list(batches)
        try:
            if not in_time():
                raise UserError("the time budget was spent")
            with ExitStack() as opened:
                sessions = [opened.enter_context(s) for s in open_pair(networks, way, batches, device)]
                while left:
                    row = _row(networks, way, left[0], sessions, settings, in_time)
                    left.pop(0)
                    yield row
        except Exception as error:  # whatever a library raises: the other ways are still worth measuring
            yield from (Row(networks.name, str(way), batch, failed=_reason(error)) for batch in left)


def _row(
    networks: Networks, way: Way, batch: int, sessions: Sequence[Session], settings: BenchSettings,
    in_time: Callable[[], bool],
) -> Row:  # fmt: skip
    if not in_time():
        raise UserError("the time budget was spent")
    images = np.random.default_rng(0).standard_normal((batch, *networks.size)).astype(np.float32)
    both = dict(zip(("dense", "pruned"), sessions, strict=True))
    try:
        feeds = {batch: {sessions[0].input_names[0]: images}}
        report = interleave(both, dict.fromkeys(both, feeds), settings)
    except torch.OutOfMemoryError as error:  # smaller batches were fine, and so is the next way
        return Row(networks.name, str(way), batch, failed=_reason(error))
    ratio = report.ratio("dense", "pruned", batch)
    dense, pruned = report.stats["dense"][batch], report.stats["pruned"][batch]
    used = report.sessions["pruned"]
    return Row(networks.name, str(way), batch, dense, pruned, ratio.median, ratio.low, ratio.high, used)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")[:300]


def benchmark(options: argparse.Namespace, console: Console) -> Path:
    """Measure everything that was asked for, as far as there is time; returns the document, saved after each figure."""
    started = time.perf_counter()

    def left() -> float:
        return 60 * float(options.minutes) - (time.perf_counter() - started)

    document = _empty_document(options)
    evidence = Evidence(options.device, quick=options.quick)
    with GpuMonitor() as monitor, tempfile.TemporaryDirectory() as folder:

        def keep() -> Path:
            document["minutes"] = round((time.perf_counter() - started) / 60, 2)
            return save(document, options.out)

        for step in evidence.right():
            document["right"][step.name] = _made(step, left)
            console.print(f"{step.name}: {document['right'][step.name]}", highlight=False, markup=False)
            keep()
        for name in options.models:
            networks = make_networks(name, Path(folder) / name)
            settings = BenchSettings(**document["settings"])
            ways = GPU_WAYS if options.device == "cuda" else CPU_WAYS
            for row in measure(networks, ways, options.batches, options.device, settings, lambda: left() > 0):
                document["rows"].append(asdict(row))
                console.print(_line(row), highlight=False, markup=False)
                keep()
        for step in evidence.cost():
            document["cost"][step.name] = _made(step, left)
            console.print(f"{step.name}: {document['cost'][step.name]}", highlight=False, markup=False)
            keep()
        document["sweep"] |= _made(Step("sweep", 60, lambda: _sweep(options)), left)
    document["gpu"] = monitor.as_json()
    return keep()


def _empty_document(options: argparse.Namespace) -> dict[str, Any]:
    settings = BenchSettings(seconds=options.seconds, rounds=20)
    if options.quick:
        settings = BenchSettings(
            seconds=options.seconds, rounds=4, warmup=1, warmup_seconds=0.0, min_iterations=4, turn_seconds=0.0
        )
    return {
        "date": date.today().isoformat(),
        "environment": environment().as_json(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "compute_capability": compute_capability(),
        "cuda": torch.version.cuda,
        "gpu": {},
        "ratio": RATIO,
        "settings": asdict(settings),
        "minutes": 0.0,
        "right": {},
        "rows": [],
        "cost": {},
        "sweep": {"batch": 2 if options.quick else 32, "dtype": "float16" if options.device == "cuda" else "float32"},
    }


def _made(step: Step, left: Callable[[], float]) -> dict[str, Any]:
    """What a step finds, or why it was not begun or failed."""
    if (seconds := left()) < step.seconds:
        return {"failed": f"not begun: it may need {step.seconds:.0f} s, and {max(seconds, 0):.0f} s were left"}
    try:
        return dict(step.run())
    except Exception as error:  # whatever a library raises: the other steps are still worth it
        return {"failed": _reason(error)}


def _sweep(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    points = sweep(
        options.device, torch.float16 if cuda else torch.float32, 2 if options.quick else 32, quick=options.quick
    )
    return _sweep_document(points)


def _sweep_document(points: Sequence[Point]) -> dict[str, Any]:
    return {
        "cost_by_alignment": cost_by_alignment(points),
        "rounding_up_pays": {str(multiple): rounding_up_pays(points, multiple) for multiple in (8, 16, 32)},
        "points": [asdict(point) for point in points],
    }


def _line(row: Row) -> str:
    head = f"{row.model} {row.way} b{row.batch}: "
    if row.dense is None or row.pruned is None:
        return f"{head}{row.failed}"
    return f"{head}{row.dense.median:.3f} -> {row.pruned.median:.3f} ms, {row.speedup:.2f}x"


def markdown(document: dict[str, Any]) -> str:
    """The same for people."""
    libraries = ", ".join(f"{name} {version}" for name, version in document["environment"]["libraries"].items())
    lines = [
        f"# {document['device']}, {document['date']}",
        "",
        f"Random weights; pruned is {100 * document['ratio']:.0f} % narrower in every width; median ms per batch, "
        "host to host, dense and pruned in turns; low to high is the 10th to 90th percentile over rounds.",
        f"Driver {document['environment']['driver']}, CUDA {document['cuda']}, {libraries}.",
        "",
        "| model | way | batch | dense ms | pruned ms | times faster | pruned images/s | spread (CV) |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        head = f"| {row['model']} | {row['way']} | {row['batch']} |"
        if row["failed"] is not None:
            lines.append(f"{head} {row['failed'].replace('|', '/')} | | | | |")
            continue
        dense, pruned = row["dense"], row["pruned"]
        lines.append(
            f"{head} {dense['median']:.3f} | {pruned['median']:.3f} "
            f"| {row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
            f"| {pruned['images_per_second']:.0f} | {100 * pruned['cv']:.1f} %{', unstable' * pruned['unstable']} |"
        )
    for title, part in (("Is CUDA right?", "right"), ("What the work costs", "cost")):
        lines += ["", f"## {title}", "", "| step | figure | value |", "|---|---|---:|"]
        for step, figures in document[part].items():
            lines += [f"| {step} | {name} | {_shown(value)} |" for name, value in figures.items()]
    found = document["sweep"]
    if "cost_by_alignment" not in found:
        return "\n".join(lines) + "\n"
    lines += ["", f"## Widths ({found['dtype']}, batch {found['batch']})", ""]
    lines += ["Cost per multiply-accumulate by the power of two that divides the width; 1 is the best aligned.", ""]
    for kind, costs in found["cost_by_alignment"].items():
        lines.append(f"- {kind}: " + ", ".join(f"{aligned}: {cost:.2f}" for aligned, cost in costs.items()))
    lines += ["", "Share of other widths that take at least as long as the next multiple above:", ""]
    for multiple, shares in found["rounding_up_pays"].items():
        lines.append(f"- of {multiple}: " + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items()))
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def save(document: dict[str, Any], folder: Path) -> Path:
    """Write `gpu-<device>-<date>.json` and `.md`; returns the first."""
    device = re.sub(r"[^a-z0-9]+", "-", str(document["device"]).lower()).strip("-")
    path = folder / f"gpu-{device}-{document['date']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(document, indent=1) + "\n").encode())
    atomic_write(path.with_suffix(".md"), markdown(document).encode())
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="timm names, separated by commas")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair and batch size (default: 2)")
    parser.add_argument("--minutes", type=float, default=10.0, help="all of it ends about then (default: 10)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script out")
    parser.add_argument("--quick", action="store_true", help="few widths and rounds")
    options = parser.parse_args(arguments)
    options.models = [name for name in options.models.split(",") if name]
    try:
        options.batches = [int(size) for size in options.batches.split(",")]
    except ValueError:
        options.batches = []
    if not options.batches or min(options.batches) < 1 or not 0 < options.minutes < math.inf or not options.models:
        parser.error("--models, --batches and --minutes: give names, positive whole numbers and a positive number")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    console = Console(stderr=True)
    try:
        options = parse(arguments)
        missing = missing_gpu() if options.device == "cuda" else None
        if missing is None and options.device == "cuda" and not torch.cuda.is_available():
            missing_why = f"This PyTorch ({torch.__version__}) does not see the GPU."
            raise MissingDependencyError("PyTorch has no CUDA here", why=missing_why, fix="Install a CUDA build.")
        if missing is not None:
            raise MissingDependencyError("there is no GPU to measure", why=missing.why, fix=missing.fix)
        options.models = [canonical_name(name) for name in options.models]
        path = benchmark(options, console)
    except UserError as error:
        console.print(str(error), highlight=False, markup=False)
        return error.exit_code
    console.print(f"{path} and {path.with_suffix('.md').name}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
