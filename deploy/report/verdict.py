"""What the figures of a report say, in sentences; all of them are functions of the document.

Nothing here is measured, and nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upvits.deploy.graphs.names import module_of
from upvits.deploy.measure.diagnosis import falls_short
from upvits.deploy.measure.document import Best, Latency
from upvits.deploy.measure.uncertainty import change_interval
from upvits.deploy.report.document import AccuracyFigures, PairedImages, Report
from upvits.deploy.runtimes import RUNTIMES

AGAINST = "against the fp32 graph, which was held against PyTorch"
"""What accuracies of precisions are relative to."""


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


def on_nvidia(runtime: str) -> bool:
    """Whether a runtime's engines run on an NVIDIA GPU; no, for a runtime of another version that is unknown here."""
    return runtime in RUNTIMES and RUNTIMES[runtime].on_nvidia


def comparisons(report: Report) -> list[Comparison]:
    """Return every pair of measurements, in the report's order of runtimes and precisions, small batches first."""
    pairs = []
    for runtime, by_precision in report.speedup.items():
        for precision, by_batch in by_precision.items():
            for batch in sorted(by_batch):
                pairs.append(
                    Comparison(
                        runtime=runtime,
                        precision=precision,
                        batch=batch,
                        dense=report.dense.latency_ms[runtime][precision][batch],
                        pruned=report.pruned.latency_ms[runtime][precision][batch],
                        speedup=by_batch[batch],
                        low=report.speedup_low.get(runtime, {}).get(precision, {}).get(batch),
                        high=report.speedup_high.get(runtime, {}).get(precision, {}).get(batch),
                    )
                )
    return pairs


def headline(report: Report) -> Best | None:
    """Return what to deploy: of the best precision of every runtime, the fastest. None when nothing was measured."""
    largest = max((best.batch for best in report.best), default=0)
    return min((b for b in report.best if b.batch == largest), key=lambda best: best.pruned_ms, default=None)


def verdict(report: Report) -> str:
    """Say the result in one sentence: speed, accuracy, size, and the device it holds for."""
    parts = [*_speed_part(headline(report), report), *_accuracy_part(report)]
    fewer = 100 * (1 - report.pruned.params / report.dense.params)
    parts.append(f"{fewer:.0f} % fewer parameters")
    device = device_of(report) if report.best else ""
    return ", ".join(parts) + (f", measured on {device}." if device else ".")


def device_of(report: Report) -> str:
    """Name what the headline was measured on: the GPU of a GPU runtime, otherwise the processor."""
    best = headline(report)
    gpus = report.environment.gpus
    return gpus[0].name if best is not None and on_nvidia(best.runtime) and gpus else report.environment.cpu


def cost_of(report: Report, best: Best) -> AccuracyFigures | None:
    """Return what the pruned network's accuracy is in the chosen precision."""
    return next(
        (
            figures
            for figures in report.accuracy
            if (figures.model, figures.runtime, figures.precision) == ("pruned", best.runtime, best.precision)
        ),
        None,
    )


def shortfall(report: Report) -> str | None:
    """Say so when latency fell far less than the MACs did (less than half of the way), and what that points to."""
    macs_gain = report.dense.macs / report.pruned.macs
    pairs = comparisons(report)
    short = [pair for pair in pairs if falls_short(macs_gain, pair.speedup)]
    if not short:
        return None
    least = min(short, key=lambda c: c.speedup)
    text = (
        f"MACs fell {macs_gain:.1f}x, latency less than half as far in {len(short)} of {len(pairs)} measurements, "
        f"least on {least.runtime} {least.precision} at batch {least.batch}: {least.speedup:.2f}x. "
        "MACs count only matrix products and convolutions. "
        "Reading and writing activations, normalisation and softmax shrink with the width instead of its square, and "
        "the cost of starting each layer does not shrink at all."
    )
    small, large = min(short, key=lambda c: c.batch), max(pairs, key=lambda c: c.batch)
    if small.batch < large.batch and large.speedup > 1.1 * small.speedup:
        text += " The gain is larger at larger batches, so at small ones the fixed cost per layer dominates."
    return text


def small_proxy(groups: int, worst: str, overlap: float) -> str:
    """What to say of so many unsteady groups, of which `worst` has the least overlap in [0, 1]."""
    return (
        f"The proxy set is small: in {groups} groups its two halves choose other units (least in {worst}: "
        f"{100 * overlap:.0f} % the same). More --proxy-images make the choice steadier."
    )


def precision_remarks(report: Report) -> list[str]:
    """How the graphs of each precision were made: what stays in fp32, calibration, layers that were put back."""
    fp32 = sorted({kind for a in report.accuracy for kind in a.in_fp32})
    remarks = [f"Around fp16 and bf16 layers, fp32 stays in {', '.join(fp32)}."] if fp32 else []
    calibrated: dict[str, list[str]] = {}
    kept: dict[str, list[str]] = {}
    for a in report.accuracy:
        if a.calibration_images is not None:
            how = f"(digest {(a.calibration_digest or 'unknown')[:12]}, method {a.calibration_method})"
            calibrated.setdefault(f"calibrated on {a.calibration_images} images {how}.", []).append(a.precision)
        if a.kept:
            kept.setdefault(_put_back(a), []).append(f"{a.model} {a.runtime} {a.precision}")
    remarks += [f"{_listed(precisions)} {text}" for text, precisions in calibrated.items()]
    return remarks + [f"{_listed(names)}: {text}" for text, names in kept.items()]


def _put_back(figures: AccuracyFigures) -> str:
    """The layers that the search put back, and what that was good for."""
    text = f"kept in {figures.rest or 'higher precision'}: {', '.join(map(module_of, figures.kept))}."
    if figures.drop_without_search is None:
        return text
    before = figures.drop_without_search
    many = len(figures.kept)
    text += f" Without putting {'this layer' if many == 1 else f'these {many} layers'} back it "
    text += f"{'lost' if before >= 0 else 'gained'} {abs(before):.2f} points"
    if figures.graphs_tried is not None:
        text += f"; {figures.graphs_tried} graphs were tried, judged on the same validation images"
    return text + "."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _speed_part(best: Best | None, report: Report) -> list[str]:
    if best is None and comparisons(report):
        return ["Latency was measured, but nothing was chosen to deploy"]
    if best is None:
        return ["Latency was not measured"]
    dense = "" if best.dense_precision == best.precision else f" than dense in {best.dense_precision}"
    where = f"on {best.runtime} {best.precision} at batch {best.batch}"
    if best.speedup >= 1:
        return [f"{best.speedup:.2f}x faster{dense} {where}"]
    return [f"Not faster: {best.speedup:.2f}x the dense speed {where}"]


def change_range(paired: PairedImages) -> tuple[float, float]:
    """The 95 % interval of the change in top-1, in points."""
    return change_interval(paired.lost, paired.won, paired.images)


def _change_of_top1(dense: float, pruned: float, paired: PairedImages | None) -> str:
    """A difference is spoken of only where there is one beyond chance."""
    change = pruned - dense
    measured = f"{dense:.2f} to {pruned:.2f} %"
    if paired is not None:
        low, high = change_range(paired)
        measured += f" on {paired.images:,} images"
        if low <= 0 <= high:
            return f"no certain change of top-1 ({measured}, {low:+.2f} to {high:+.2f} points)"
        measured += f", {low:+.2f} to {high:+.2f} points"
    elif abs(change) < 0.005:
        return f"top-1 unchanged ({pruned:.2f} %)"
    return f"{abs(change):.2f} points of top-1 {'lost' if change < 0 else 'gained'} ({measured})"


def _accuracy_part(report: Report) -> list[str]:
    dense, pruned = report.dense.top1, report.pruned.top1
    best = headline(report)
    cost = None if best is None else cost_of(report, best)
    parts = []
    if dense is not None and pruned is not None:
        parts.append(_change_of_top1(dense, pruned, report.pruned.paired))
    elif report.pruned.agreement is not None:
        parts.append(f"the same top-1 as the dense model on {report.pruned.agreement:.1f} % of the unlabelled images")
    else:
        return ["accuracy not measured"]
    if best is not None and cost is not None and best.precision != "fp32":
        parts.append(f"{_change_by_precision(cost)} by {best.precision} on {cost.images:,} images")
    return parts


def _change_by_precision(cost: AccuracyFigures) -> str:
    """Likewise; figures of older runs have no counts of images."""
    if cost.lost is not None and cost.won is not None:
        low, high = change_interval(cost.lost, cost.won, cost.images)
        if low <= 0 <= high:
            return "no certain change"
    return f"{abs(cost.drop):.2f} points {'lost' if cost.drop >= 0 else 'gained'}"
