"""The report of a run: `report.json` is authoritative, everything that people read is derived from it.

Units: latency in milliseconds, accuracy in percent, MACs per image, memory in MB (10**6 bytes), time in seconds;
`agreement` is a share of images (0 to 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from calib_data.errors import UserError
from deploy.artifacts import StageRecord, atomic_write

REPORT = "report.json"
UNSTABLE_CV = 0.025


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _OpenDocument(_Document):
    """Has the named fields at least; whoever measured may say more."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Latency(_OpenDocument):
    """One timed model at one batch size, in ms per batch. `cv` is standard deviation over mean, `n` the repetitions."""

    min: float
    median: float
    mean: float
    p90: float
    p99: float
    cv: float
    images_per_s: float
    n: int


# runtime -> precision -> "b<batch>" -> value
Latencies = Mapping[str, Mapping[str, Mapping[str, Latency]]]
Speedups = dict[str, dict[str, dict[str, float]]]


class ModelFigures(_Document):
    """What a model is and does. `top1` is None where the images have no labels."""

    params: int
    macs: int
    top1: float | None
    latency_ms: dict[str, dict[str, dict[str, Latency]]] = {}


class PrunedFigures(ModelFigures):
    """`top1_after_prune`: before fine-tuning. `agreement`: share of images on which it says what the dense one says."""

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
    """One gate: outputs of `candidate` against those of `reference` on real images. `cosine` is the worst image's."""

    model: Literal["dense", "pruned"]
    reference: str
    candidate: str
    images: int
    max_abs: float
    cosine: float
    agreement: float
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
    parity: list[Parity] = []
    engines: list[EngineFigures] = []
    stages: list[StageRecord] = []
    plan: PlanFigures | None = None
    measurement: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    notes: list[str] = []


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dense against pruned in one runtime, precision and batch size; `speedup` is of the medians."""

    runtime: str
    precision: str
    batch: int
    dense: Latency
    pruned: Latency
    speedup: float


def speedups(dense: Latencies, pruned: Latencies) -> Speedups:
    """Return dense median / pruned median wherever both were measured."""
    result: Speedups = {}
    for runtime, precision, batch, latency in _flat(pruned):
        before = dense.get(runtime, {}).get(precision, {}).get(batch)
        if before is not None:
            by_batch = result.setdefault(runtime, {}).setdefault(precision, {})
            by_batch[batch] = round(before.median / latency.median, 3)
    return result


def comparisons(report: Report) -> list[Comparison]:
    """Return every pair of measurements, in the report's order of runtimes and precisions, small batches first."""
    found = []
    for runtime, precision, batch, latency in _flat(report.pruned.latency_ms):
        speedup = report.speedup.get(runtime, {}).get(precision, {}).get(batch)
        if speedup is not None:
            dense = report.dense.latency_ms[runtime][precision][batch]
            found.append(Comparison(runtime, precision, int(batch.removeprefix("b")), dense, latency, speedup))
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
    environment = report.environment
    on_gpu = best is not None and not best.runtime.endswith("cpu") and best.runtime != "onnxruntime"
    name = environment.get("gpu") if on_gpu else None
    return str(name or environment.get("cpu") or "")


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


def save_report(run_dir: Path, report: Report) -> None:
    """Write report.json, and report.md and report.html derived from it. Each file is replaced as a whole."""
    from deploy.report_views import html, markdown  # the views import the document

    atomic_write(run_dir / REPORT, (report.model_dump_json(indent=2) + "\n").encode())
    atomic_write(run_dir / "report.md", markdown(report).encode())
    atomic_write(run_dir / "report.html", html(report).encode())


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


def _flat(latencies: Latencies) -> Iterator[tuple[str, str, str, Latency]]:
    for runtime, by_precision in latencies.items():
        for precision, by_batch in by_precision.items():
            for batch in sorted(by_batch, key=lambda name: int(name.removeprefix("b"))):
                yield runtime, precision, batch, by_batch[batch]


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
        return [f"{abs(change):.2f} points of top-1 {'lost' if change < 0 else 'gained'} ({dense:.2f} to {pruned:.2f} %)"]
    if report.pruned.agreement is not None:
        return [f"the same top-1 as the dense model on {100 * report.pruned.agreement:.1f} % of the unlabelled images"]
    return ["accuracy not measured"]
