"""The sections of a report, and the report as Markdown and as tables for an 80-column terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upvits.calib_data.printable import printable
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import verdict
from upvits.deploy.report.views import answers, details, detection, results
from upvits.deploy.report.views.section import Section, without_empty_columns
from upvits.deploy.report.views.summary import shortcomings, subject
from upvits.deploy.report.views.terms import terms_in

_HTML = re.compile("<(?=[A-Za-z/!?])")
"""Where Markdown would take HTML for what it is."""


def sections(report: Report) -> list[Section]:
    """Return the sections of a report, most important first, without those that have no content."""
    parts = [
        results.result(report),
        results.best(report),
        details.target(report),
        results.latency(report),
        results.latency_parts(report),
        results.accuracy(report),
        answers.pictures(report),
        answers.classes(report),
        answers.learning(report),
        details.built(report),
        details.findings(report),
        details.widths(report),
        details.compensation(report),
        *detection.sections(report.detection),
        *details.layer_times(report),
        details.parity(report),
        details.engines(report),
        details.throughput(report),
        details.facts("gpu", "GPU while measuring", report.gpu),
        details.facts("environment", "Where it was measured", report.environment.model_dump(exclude_none=True)),
        details.facts("measurement", "How it was measured", report.measurement),
        details.reproduce(report),
        details.stages(report),
        details.notes(report),
    ]
    return [without_empty_columns(section) for section in parts if section.rows or section.remarks or section.commands]


def markdown(report: Report) -> str:
    """Return report.md."""
    head = [f"# {report.model}: dense and pruned", "", f"**{verdict(report)}**", "", subject(report), ""]
    lines = [_plain(line) for line in head]
    short = shortcomings(report)
    if short:
        lines += ["## What fell short", "", *(_plain(f"- {text}") for text in short), ""]
    lines += markdown_sections(sections(report))
    words = [f"- {term}: {meaning}" for term, meaning in terms_in(*lines)]
    return "\n".join([*lines, "## Words", "", *words]) + "\n"


def terminal(report: Report) -> Group:
    """Return what `rich` prints: the verdict and the tables that decide, at most 80 columns wide."""
    short = shortcomings(report)
    parts: list[RenderableType] = [Text(verdict(report), style="bold"), Text("")]
    if short:
        parts += [*(Text(f"! {text}", style="yellow") for text in short), Text("")]
    parts += terminal_sections(sections(report))
    if report.notes:
        parts += [Text(""), Text("What was left out, and why: see report.md.", style="dim")]
    return Group(*parts)


def markdown_sections(sections: Iterable[Section]) -> list[str]:
    """Lines of Markdown."""
    lines: list[str] = []
    for section in sections:
        lines += [_plain(f"## {section.title}"), ""]
        if section.rows:
            rules = ["---" if i in section.text_columns else "---:" for i in range(len(section.header))]
            rows = [[cell.text for cell in row] for row in section.rows[: section.shown or None]]
            lines += [_markdown_row(row) for row in (section.header, rules, *rows)] + [""]
            if len(rows) < len(section.rows):
                lines += [f"The first {len(rows)} of {len(section.rows)}; all are in report.html and report.json.", ""]
        if section.commands:
            lines += ["```bash", *map(_plain, section.commands), "```", ""]
        lines += [_plain(f"- {remark}") for remark in section.remarks] + ([""] if section.remarks else [])
    return lines


def terminal_sections(sections: Iterable[Section]) -> list[RenderableType]:
    """Tables and remarks of the sections that belong on a terminal."""
    parts: list[RenderableType] = []
    for section in sections:
        if section.terminal is None:
            continue
        if section.rows:
            parts.append(_terminal_table(section, section.terminal))
        elif section.remarks:
            parts.append(Text(section.title, style="italic"))
        parts += [Text(f"- {remark}") for remark in section.remarks]
        parts.append(Text(""))
    return parts[:-1]


def _terminal_table(section: Section, columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=section.title, title_justify="left", pad_edge=False)
    for column in columns:
        text = column in section.text_columns
        table.add_column(section.header[column], justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for row in section.rows:
        table.add_row(*(Text(row[column].text) for column in columns))
    return table


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """One line of Markdown in which names from files are no HTML and no control characters."""
    return _HTML.sub("&lt;", printable(text.replace("\n", " ")))
