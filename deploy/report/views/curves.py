"""Geometry of the learning curve; templates/parts.html draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from upvits.deploy.report.document import Report
from upvits.deploy.report.views.charts import Line, Tick, nice_ticks, place

HEIGHT = 150
_TOP = 14  # pixels: above it, the label of a tick would stand in the title


@dataclass(frozen=True, slots=True)
class Dot:
    """A measured value; `text` says it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Curve:
    """One figure over the epochs; `level` is the height of the dense network's line, None without one."""

    title: str
    description: str
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    dots: tuple[Dot, ...]
    lines: tuple[Line, ...]
    level: float | None = None


def learning_curves(report: Report) -> list[Curve]:
    """Accuracy and loss over epochs, each where there are two values at least."""
    labelled = any(epoch.top1 is not None for epoch in report.learning)
    name = "Top-1 of the validation images, %" if labelled else "Agreement with the dense network, %"
    judged = [(e.epoch, value) for e in report.learning if (value := e.top1 if labelled else e.agreement) is not None]
    if judged and labelled and report.pruned.top1_after_prune is not None:
        judged.insert(0, (0, report.pruned.top1_after_prune))
    losses = [(e.epoch, e.loss) for e in report.learning]
    drawn = [
        _curve(name, judged, "%", report.dense.top1 if labelled else None),
        _curve("Loss over the training images", losses, "", None),
    ]
    return [curve for curve in drawn if curve is not None]


def _curve(title: str, values: Sequence[tuple[int, float]], unit: str, level: float | None) -> Curve | None:
    if len(values) < 2:
        return None
    every = [value for _, value in values] + ([] if level is None else [level])
    pad = max(0.12 * (max(every) - min(every)), 1e-3 * max(map(abs, every)), 1e-6)
    low, high = min(every) - pad, max(every) + pad
    first, last = values[0][0], values[-1][0]

    def y(value: float) -> float:
        return round(HEIGHT * (high - value) / (high - low), 2)

    def told(epoch: int, value: float) -> str:
        when = "before fine-tuning" if epoch == 0 else f"epoch {epoch}"
        return f"{when}: {value:.2f} %" if unit else f"{when}: {value:.4g}"

    dots = tuple(Dot(place(epoch, first, last), y(value), told(epoch, value)) for epoch, value in values)
    epochs = [tick for tick in nice_ticks(first, last) if tick == int(tick)]
    return Curve(
        title,
        f"{title}, over {last} epochs: {told(*values[0])}; {told(*values[-1])}."
        + ("" if level is None else f" Dense: {level:.2f} %."),
        HEIGHT,
        tuple(Tick(place(tick, first, last), f"{tick:g}") for tick in epochs),
        tuple(Tick(y(tick), f"{tick:g}") for tick in nice_ticks(low, high, 4) if y(tick) >= _TOP),
        dots,
        tuple(Line(a.x, a.y, b.x, b.y) for a, b in pairwise(dots)),
        None if level is None else y(level),
    )
