"""Geometry of the charts; templates/charts.html draws it.

Horizontal positions are percent of the chart's width and vertical ones are pixels, so that a chart grows with the page
while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from upvits.deploy.report.views.section import three_digits

LEFT, RIGHT = 12.0, 97.0
BINS = 160
DRAWN_UP_TO = 98
"""Percentile at which the axis of a latency chart ends: a single slow call would flatten the histograms."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Calls:
    """Times of calls to show: `quantiles` are the 0th to 100th percentile in equal steps."""

    label: str
    model: str
    median: float
    quantiles: Sequence[float]


@dataclass(frozen=True, slots=True)
class Column:
    """One bar of a histogram; `height` from 0 to 1."""

    x: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Strip:
    """How the calls of one model spread: histogram, middle half, and median."""

    label: str
    model: str
    text: str
    columns: tuple[Column, ...]
    low: float
    high: float
    median: float
    text_at: float
    text_before: bool


@dataclass(frozen=True, slots=True)
class LatencyChart:
    """Strips on one axis that starts at 0 ms."""

    title: str
    description: str
    ticks: tuple[Tick, ...]
    strips: tuple[Strip, ...]
    beyond: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing to deploy: a model in a precision, its latency and accuracy.

    `label` is drawn, `name` is the full name; points of a `series` have the same shape, number `mark`. `within` and
    `ms_within` are the 95 % interval of the accuracy and the middle 80 % of the calls, where these are known.
    """

    label: str
    name: str
    model: str
    series: str
    mark: int
    ms: float
    accuracy: float
    within: tuple[float, float] | None = None
    ms_within: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A point, with its label `dx`, `dy` pixels away, and bars for its uncertainty."""

    choice: Choice
    x: float
    y: float
    dx: float
    dy: float
    before: bool
    on_front: bool
    text: str
    bars: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A part of a front, a curve or a bar."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Scatter:
    """Accuracy over latency."""

    title: str
    description: str
    x_name: str
    y_name: str
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    front: tuple[Line, ...]


def latency_chart(title: str, calls: Sequence[Calls]) -> LatencyChart | None:
    """Lay out distributions on a shared axis; None where no distribution was kept."""
    drawn = [call for call in calls if len(call.quantiles) > 1]
    if not drawn:
        return None
    end = 1.04 * max(_percentile(call.quantiles, DRAWN_UP_TO) for call in drawn)
    told = "; ".join(f"{call.label} {call.model} {three_digits(call.median)} ms" for call in drawn)
    return LatencyChart(
        title,
        f"Distribution of the time of a call in ms. Medians: {told}.",
        tuple(Tick(place(value, 0, end), f"{value:g}") for value in nice_ticks(0, end)),
        tuple(_strip(call, end) for call in drawn),
        any(call.quantiles[-1] > end for call in drawn),
    )


def scatter(title: str, choices: Sequence[Choice], y_name: str, height: int = 320) -> Scatter | None:
    """Lay out accuracy over latency with the Pareto front; None without two points."""
    if len(choices) < 2:
        return None
    every: list[float] = [value for c in choices for value in (c.accuracy, *(c.within or ()))]
    pad = max(0.15 * (max(every) - min(every)), 0.25)
    low, high = min(every) - pad, max(every) + pad
    end = 1.12 * max(c.ms for c in choices)
    front = pareto(choices)

    def up(value: float) -> float:
        return round(height - height * (value - low) / (high - low), 2)

    def at(choice: Choice) -> tuple[float, float]:
        return place(choice.ms, 0, end), up(choice.accuracy)

    def bars(choice: Choice) -> tuple[Line, ...]:
        x, y = at(choice)
        drawn = [] if choice.within is None else [Line(x, up(choice.within[0]), x, up(choice.within[1]))]
        if choice.ms_within is not None:
            left, right = (place(min(ms, end), 0, end) for ms in choice.ms_within)
            drawn.append(Line(left, y, right, y))
        return tuple(drawn)

    told = "; ".join(f"{c.name} {three_digits(c.ms)} ms {c.accuracy:.2f} %" for c in front)
    steps = [at(c) for c in front]
    return Scatter(
        title,
        f"{y_name} over latency of {len(choices)} choices. Nothing is both faster and more accurate than: {told}.",
        "ms per batch",
        y_name,
        height,
        tuple(Tick(place(value, 0, end), f"{value:g}") for value in nice_ticks(0, end)),
        tuple(Tick(up(v), f"{v:g}") for v in nice_ticks(low, high) if low < v < high),
        tuple(replace(m, bars=bars(m.choice)) for m in _marks([(c, *at(c)) for c in choices], front, height)),
        tuple(Line(*start, *stop) for start, stop in pairwise(steps)),
    )


def pareto(choices: Iterable[Choice]) -> list[Choice]:
    """The choices that no other one beats in latency and accuracy, fastest first."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.ms, -c.accuracy)):
        if not front or choice.accuracy > front[-1].accuracy:
            front.append(choice)
    return front


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within a range."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def place(value: float, low: float, high: float) -> float:
    """Percent of a chart's width where a value of an axis from `low` to `high` stands."""
    return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 3)


def _percentile(quantiles: Sequence[float], percent: float) -> float:
    return float(np.interp(percent, np.linspace(0, 100, len(quantiles)), quantiles))


def _strip(calls: Calls, end: float) -> Strip:
    edges = np.linspace(0, end, BINS + 1)
    # the share of calls below each edge, and from that the share within each bin
    below = np.interp(edges, calls.quantiles, np.linspace(0, 1, len(calls.quantiles)), left=0, right=1)
    share = np.diff(below)
    width = (RIGHT - LEFT) / BINS
    columns = tuple(
        Column(place(float(edge), 0, end), round(width, 3), round(float(part / share.max()), 3))
        for edge, part in zip(edges, share, strict=False)
        if part > 0.001
    )
    last = columns[-1].x + width
    before = last > 80
    first = columns[0].x if columns[0].x > 2 * LEFT else RIGHT  # over the thin end: before it stands the strip's label
    return Strip(
        calls.label,
        calls.model,
        f"{three_digits(calls.median)} ms",
        columns,
        place(_percentile(calls.quantiles, 25), 0, end),
        place(_percentile(calls.quantiles, 75), 0, end),
        place(calls.median, 0, end),
        first if before else last,
        before,
    )


# Labels are placed for the narrowest page and checked on wider ones, where everything stands further apart.
_PAGE_WIDTHS = (300, 600, 1000)
_LETTER, _LINE = 7.0, 14.0
_TRIED = [(13.0, dy, before) for dy in (4.0, -10.0, 18.0, -24.0, 32.0, -38.0, 46.0, -52.0) for before in (False, True)]


def _marks(placed: Sequence[tuple[Choice, float, float]], front: Sequence[Choice], height: int) -> Iterator[Mark]:
    """Label the points so that no label covers another one or a point; a label without a place is left out."""
    points = [(x, y, -6.0, 6.0, -6.0, 6.0) for _, x, y in placed]
    taken: list[tuple[float, float, float, float, float, float]] = []
    for number, (choice, x, y) in enumerate(placed):
        others = taken + points[:number] + points[number + 1 :]
        for dx, dy, before in _TRIED:
            box = _label_box(choice.label, x, y, dx, dy, before)
            inside = y + dy - _LINE + 4 >= 0 and y + dy <= height
            if inside and _fits(box) and not any(_overlap(box, other) for other in others):
                taken.append(box)
                yield Mark(choice, x, round(y, 2), -dx if before else dx, dy, before, choice in front, choice.label)
                break
        else:
            yield Mark(choice, x, round(y, 2), 0.0, 0.0, False, choice in front, "")


def _label_box(
    label: str, x: float, y: float, dx: float, dy: float, before: bool
) -> tuple[float, float, float, float, float, float]:
    """Anchor in percent and pixels, then left, right, top and bottom of the text in pixels from that anchor."""
    width = _LETTER * len(label)
    left = -dx - width if before else dx
    return x, y, left, left + width, dy - _LINE + 3, dy + 3


def _fits(box: tuple[float, float, float, float, float, float]) -> bool:
    x, _, left, right, _, _ = box
    narrow = _PAGE_WIDTHS[0]
    return x / 100 * narrow + left >= 0 and x / 100 * narrow + right <= narrow


def _overlap(
    one: tuple[float, float, float, float, float, float], other: tuple[float, float, float, float, float, float]
) -> bool:
    if one[1] + one[5] <= other[1] + other[4] or other[1] + other[5] <= one[1] + one[4]:
        return False
    for page in _PAGE_WIDTHS:
        apart = (other[0] - one[0]) / 100 * page
        if one[3] > apart + other[2] and apart + other[3] > one[2]:
            return True
    return False
