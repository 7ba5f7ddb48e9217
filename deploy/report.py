"""The report of a run: `report.json` is authoritative, everything that people read is derived from it.

Units: latency in milliseconds, accuracy and agreement in percent, MACs per image, memory in MB (10**6 bytes), time in
seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from calib_data.errors import UserError
from deploy.artifacts import StageRecord
from deploy.bench import LatencyReport, LatencyStats
from deploy.runtimes.interface import Engine

REPORT = "report.json"
_GPU_RUNTIMES = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _OpenDocument(_Document):
    """Has the named fields at least; whoever measured may say more."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Latency(_Document):
    """One timed model at one batch size, in ms per batch.

    `cv` is standard deviation over mean, `n` the number of calls, `threads` what the CPU session ran with.
    """

    min: float
    median: float
    mean: float
    p90: float
    p99: float
    cv: float
    images_per_s: float
    n: int
    threads: int | None = None


# runtime -> precision -> "b<batch>" -> value
Latencies: TypeAlias = dict[str, dict[str, dict[str, Latency]]]
Speedups: TypeAlias = dict[str, dict[str, dict[str, float]]]


class Bench(_Document):
    """Latencies of both models and how many times faster the pruned one is, as they go into the report.

    `speedup` is the median over rounds of the ratio of medians within a round, `speedup_low` and `speedup_high` the
    10th and 90th percentile over rounds.
    """

    dense: Latencies = {}
    pruned: Latencies = {}
    speedup: Speedups = {}
    speedup_low: Speedups = {}
    speedup_high: Speedups = {}


class ModelFigures(_Document):
    """What a model is and does. `top1` is None where the images have no labels."""

    params: int
    macs: int
    top1: float | None
    latency_ms: Latencies = {}


class PrunedFigures(ModelFigures):
    """`top1_after_prune`: before fine-tuning. `agreement`: images with the dense model's top-1, in percent."""

    top1_after_prune: float | None
    agreement: float | None


class Width(_Document):
    """One prunable dimension before and after."""

    group: str
    before: int
    after: int


class PlanFigures(_Document):
    """What was asked of the plan, what it came to, and the widths."""

    asked: dict[str, Any]
    got: dict[str, Any]
    widths: list[Width]


class Parity(_OpenDocument):
    """One gate: outputs of `candidate` against those of `reference` on real images."""

    model: Literal["dense", "pruned"]
    reference: str
    candidate: str
    images: int
    max_abs: float
    min_cosine: float
    top1_agreement: float
    passed: bool


class EngineFigures(_OpenDocument):
    """One built engine; `path` is relative to the run directory."""

    model: Literal["dense", "pruned"]
    runtime: str
    precision: str
    target: str
    path: str
    bytes: int
    seconds: float


class Report(_Document):
    """The whole result of a run. `ratio` is None where the widths came from a target or a smaller model."""

    format_version: Literal[1] = 1
    model: str
    ratio: float | None
    data: str
    weights: str
    dense: ModelFigures
    pruned: PrunedFigures
    speedup: Speedups = {}
    speedup_low: Speedups = {}
    speedup_high: Speedups = {}
    parity: list[Parity] = []
    engines: list[EngineFigures] = []
    stages: list[StageRecord] = []
    plan: PlanFigures | None = None
    measurement: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    notes: list[str] = []


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dense against pruned in one runtime, precision and batch size; `low` to `high` is the speed-up's range."""

    runtime: str
    precision: str
    batch: int
    dense: Latency
    pruned: Latency
    speedup: float
    low: float | None
    high: float | None


def bench_figures(reports: Mapping[tuple[str, str], LatencyReport]) -> Bench:
    """Arrange measurements for the report.

    Args:
        reports: by runtime and precision; each measured the sessions `dense` (the reference) and `pruned` in turns.
    """
    figures = Bench()
    for (runtime, precision), report in reports.items():
        for name, tree in (("dense", figures.dense), ("pruned", figures.pruned)):
            threads = report.sessions[name].get("intra_op_threads")
            tree.setdefault(runtime, {})[precision] = {
                f"b{batch}": _latency(value, None if threads is None else int(threads))
                for batch, value in report.stats[name].items()
            }
        for name, table in (("median", figures.speedup), ("low", figures.speedup_low), ("high", figures.speedup_high)):
            table.setdefault(runtime, {})[precision] = {
                f"b{batch}": round(getattr(value, name), 3) for batch, value in report.speedup["pruned"].items()
            }
    return figures


def engine_figures(model: Literal["dense", "pruned"], engine: Engine, run_dir: Path) -> EngineFigures:
    """Describe a built engine for the report."""
    return EngineFigures(
        model=model,
        runtime=engine.runtime,
        precision=engine.precision,
        target=", ".join(engine.targets) or "any",
        path=engine.path.relative_to(run_dir).as_posix(),
        bytes=engine.bytes,
        seconds=engine.seconds,
    )


def comparisons(report: Report) -> list[Comparison]:
    """Return every pair of measurements, in the report's order of runtimes and precisions, small batches first."""
    found = []
    for runtime, by_precision in report.speedup.items():
        for precision, by_batch in by_precision.items():
            for name in sorted(by_batch, key=lambda name: int(name.removeprefix("b"))):
                found.append(
                    Comparison(
                        runtime=runtime,
                        precision=precision,
                        batch=int(name.removeprefix("b")),
                        dense=report.dense.latency_ms[runtime][precision][name],
                        pruned=report.pruned.latency_ms[runtime][precision][name],
                        speedup=by_batch[name],
                        low=report.speedup_low.get(runtime, {}).get(precision, {}).get(name),
                        high=report.speedup_high.get(runtime, {}).get(precision, {}).get(name),
                    )
                )
    return found


def headline(report: Report) -> Comparison | None:
    """Return the comparison to judge by: at the largest batch, where the pruned model is fastest."""
    found = comparisons(report)
    largest = max((c.batch for c in found), default=0)
    return min((c for c in found if c.batch == largest), key=lambda c: c.pruned.median, default=None)


def verdict(report: Report) -> str:
    """Say the result in one sentence: speed, accuracy, size, and the device it holds for."""
    parts = [*_speed_part(headline(report)), *_accuracy_part(report)]
    fewer = 100 * (1 - report.pruned.params / report.dense.params)
    parts.append(f"{fewer:.0f} % fewer parameters")
    device = device_of(report)
    return ", ".join(parts) + (f", measured on {device}." if device else ".")


def device_of(report: Report) -> str:
    """Name what the headline was measured on: the GPU of a GPU runtime, otherwise the processor."""
    best = headline(report)
    gpus = report.environment.get("gpus")
    if best is not None and best.runtime in _GPU_RUNTIMES and gpus:
        return str(gpus[0]["name"])
    return str(report.environment.get("cpu", ""))


def shortfall(report: Report) -> str | None:
    """Say so when latency fell far less than the MACs did (less than half of the way), and what that points to."""
    macs_gain = report.dense.macs / report.pruned.macs
    short = [c for c in comparisons(report) if c.speedup < 1 + (macs_gain - 1) / 2]
    if macs_gain <= 1 or not short:
        return None
    where = "; ".join(f"{c.speedup:.2f}x on {c.runtime} {c.precision} at batch {c.batch}" for c in short)
    text = (
        f"MACs fell {macs_gain:.1f}x, latency much less: {where}. MACs count only matrix products and convolutions. "
        "Reading and writing activations, normalisation and softmax shrink with the width instead of its square, and "
        "the cost of starting each layer does not shrink at all."
    )
    small, large = min(short, key=lambda c: c.batch), max(comparisons(report), key=lambda c: c.batch)
    if small.batch < large.batch and large.speedup > 1.1 * small.speedup:
        text += " The gain is larger at larger batches, so at small ones the fixed cost per layer dominates."
    return text


def load_report(run_dir: Path) -> Report:
    """Read report.json of a run.

    Raises:
        UserError: there is none, or it is not a report of this version.
    """
    path = run_dir / REPORT
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError:
        raise UserError(
            f"{run_dir} has no {REPORT}.",
            why="The report is written at the end of a run.",
            fix="Run `upvits-deploy build` with this folder as --output: it continues where it stopped.",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"cannot read {path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}.",
            why="It is damaged or was written by another version.",
            fix="Run `upvits-deploy build` with this folder as --output to write it again.",
        ) from error


def _latency(stats: LatencyStats, threads: int | None) -> Latency:
    return Latency(
        min=stats.min,
        median=stats.median,
        mean=stats.mean,
        p90=stats.p90,
        p99=stats.p99,
        cv=stats.cv,
        images_per_s=stats.images_per_second,
        n=stats.iterations,
        threads=threads,
    )


def _speed_part(best: Comparison | None) -> list[str]:
    if best is None:
        return ["Latency was not measured"]
    where = f"on {best.runtime} {best.precision} at batch {best.batch}"
    if best.speedup >= 1:
        return [f"{best.speedup:.2f}x faster {where}"]
    return [f"Not faster: {best.speedup:.2f}x the dense speed {where}"]


def _accuracy_part(report: Report) -> list[str]:
    dense, pruned = report.dense.top1, report.pruned.top1
    if dense is not None and pruned is not None:
        change = pruned - dense
        if abs(change) < 0.005:
            return [f"top-1 unchanged ({pruned:.2f} %)"]
        return [
            f"{abs(change):.2f} points of top-1 {'lost' if change < 0 else 'gained'} ({dense:.2f} to {pruned:.2f} %)"
        ]
    if report.pruned.agreement is not None:
        return [f"the same top-1 as the dense model on {report.pruned.agreement:.1f} % of the unlabelled images"]
    return ["accuracy not measured"]
