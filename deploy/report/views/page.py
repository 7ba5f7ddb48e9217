"""report.html: one page that needs nothing else, light or dark, on a screen, a phone or paper."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from upvits.deploy.measure.document import Latency
from upvits.deploy.measure.uncertainty import share_interval
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import comparisons, headline, verdict
from upvits.deploy.report.views.answers import told_of_pictures
from upvits.deploy.report.views.charts import Calls, Choice, LatencyChart, Scatter, latency_chart, scatter
from upvits.deploy.report.views.curves import Curve, learning_curves
from upvits.deploy.report.views.results import measured
from upvits.deploy.report.views.section import Section
from upvits.deploy.report.views.summary import shortcomings, subject, tiles
from upvits.deploy.report.views.terms import LABELLED, explained, terms_in, terms_of
from upvits.deploy.report.views.text import sections

_FIRST = ("classes", "learning", "detection")
"""Sections that stand open, after the chart and the pictures."""

_CHAPTERS = (
    ("Dense against pruned", ("result", "best", "target")),
    ("Latency", ("latency", "parts")),
    ("Accuracy of each precision", ("accuracy",)),
    ("What was really built", ("built",)),
    ("Why is it not faster?", ("findings",)),
    ("Widths", ("widths", "compensation")),
    ("Detectors: latency, engines, classes", ("detection-latency", "detection-engines", "detection-classes")),
    ("Time per layer", ("layers",)),
    ("Checks and files", ("parity", "engines", "throughput", "gpu")),
    ("How and where", ("environment", "measurement", "reproduce", "stages", "notes")),
)
"""The others, folded."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a table under one heading; `label` is empty for rows without a heading."""

    label: str
    numbers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chapter:
    """A second-level heading with its sections and charts; folded unless it is `open`."""

    key: str
    title: str
    sections: tuple[Section, ...]
    strips: tuple[LatencyChart, ...] = ()
    curves: tuple[Curve, ...] = ()
    open: bool = False


def html(report: Report) -> str:
    """Return report.html."""
    shown, large = shortcomings(report), tiles(report)
    return render(
        "report.html",
        title=f"{report.model}: dense and pruned",
        report=report,
        verdict=verdict(report),
        subject=subject(report),
        tiles=large,
        shortcomings=shown,
        terms=terms_in(verdict(report), *shown, *(tile.name for tile in large)),
        charts=accuracy_charts(report),
        told_of_pictures=told_of_pictures,
        chapters=chapters(report),
    )


def chapters(report: Report) -> list[Chapter]:
    """The sections of a report under their headings, charts first; pictures have a part of the page of their own."""
    shown = sections(report)
    curves = tuple(learning_curves(report))
    made = [
        Chapter(f"chapter-{s.key}", s.title, (s,), open=True)
        if s.key != "learning"
        else Chapter(f"chapter-{s.key}", s.title, (s,), curves=curves, open=bool(curves))
        for s in shown
        if s.key in _FIRST
    ]
    for title, keys in _CHAPTERS:
        inside = tuple(section for section in shown if section.key in keys)
        strips = tuple(latency_charts(report)) if keys[0] == "latency" else ()
        if inside:
            made.append(Chapter(f"chapter-{keys[0]}", title, inside, strips))
    return made


def latency_charts(report: Report) -> list[LatencyChart]:
    """Distributions of dense and pruned, a chart for each runtime and batch size."""
    calls: dict[tuple[str, int], list[Calls]] = {}
    for c in comparisons(report):
        for model, latency in (("dense", c.dense), ("pruned", c.pruned)):
            timed = Calls(c.precision, model, latency.median, latency.quantiles)
            calls.setdefault((c.runtime, c.batch), []).append(timed)
    drawn = (latency_chart(f"{runtime}, batch {batch}", same) for (runtime, batch), same in calls.items())
    return [chart for chart in drawn if chart is not None]


def accuracy_charts(report: Report) -> list[Scatter]:
    """Accuracy over latency at the batch size of the verdict."""
    head = headline(report)
    if head is None:
        return []
    images = {a.images for a in report.accuracy}
    of = f" of {images.pop():,} images" if len(images) == 1 else ""
    name = accuracy_name(report) + of
    chart = scatter(f"Accuracy over latency, batch {head.batch}", choices(report, head.batch), name)
    return [chart] if chart is not None else []


def choices(report: Report, batch: int) -> list[Choice]:
    """Every model and precision of which latency and accuracy are known."""
    runtimes = list(dict.fromkeys(a.runtime for a in report.accuracy))
    labelled = all(a.top1 is not None for a in report.accuracy)
    latencies = {
        (model, runtime, precision): latency
        for model, tree in (("dense", report.dense.latency_ms), ("pruned", report.pruned.latency_ms))
        for runtime, precision, own_batch, latency in measured(tree)
        if own_batch == batch
    }
    return [
        Choice(
            label=a.precision,
            name=f"{a.model} {a.runtime} {a.precision}",
            model=a.model,
            series=a.runtime,
            mark=runtimes.index(a.runtime),
            ms=latencies[a.model, a.runtime, a.precision].median,
            accuracy=(share := a.top1 if labelled and a.top1 is not None else a.agreement),
            within=share_interval(share, a.images),
            ms_within=_middle(latencies[a.model, a.runtime, a.precision]),
        )
        for a in report.accuracy
        if (a.model, a.runtime, a.precision) in latencies
    ]


def _middle(latency: Latency) -> tuple[float, float] | None:
    """The times between which 80 % of the calls lie."""
    if len(latency.quantiles) < 2:
        return None
    low, high = np.interp((10, 90), np.linspace(0, 100, len(latency.quantiles)), latency.quantiles)
    return float(low), float(high)


def accuracy_name(report: Report) -> str:
    """What the accuracy of `choices` is."""
    labelled = all(a.top1 is not None for a in report.accuracy)
    return "top-1, %" if labelled else "agreement with the fp32 graph, %"


def row_groups(section: Section) -> list[Group]:
    """Which rows stand together, in order."""
    if not section.groups:
        return [Group("", list(range(len(section.rows))))]
    groups: list[Group] = []
    for number, name in enumerate(section.groups):
        if not groups or groups[-1].label != name:
            groups.append(Group(name))
        groups[-1].numbers.append(number)
    return groups if len(groups) > 1 else [Group("", groups[0].numbers)]


def legend(chart_choices: Iterable[Choice]) -> list[tuple[int, str]]:
    """Shape and name of every series in a scatter chart."""
    return list(dict.fromkeys((choice.mark, choice.series) for choice in chart_choices))


def breakable(text: str) -> Markup:
    """Let long names of layers and files break after their separators."""
    return Markup(re.sub(r"(?<=\w)([/._,-])(?=\w)", r"\1<wbr>", str(escape(text))))


def render(template: str, **values: Any) -> str:
    """Fill a page of templates/."""
    return _templates().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("upvits.deploy"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals.update(row_groups=row_groups, legend=legend, terms_of=terms_of, labelled=LABELLED)
    environment.filters.update(breakable=breakable, explained=explained)
    return environment
