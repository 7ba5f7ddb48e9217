"""What people read of a report: Markdown, one HTML page, and tables for an 80-column terminal.

All three show the same sections; the terminal leaves out some of the sections and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.artifacts import atomic_write
from deploy.bench import UNSTABLE_CV
from deploy.report import REPORT, Report, comparisons, shortfall, verdict


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a table (the first column is text, the others numbers unless `text_columns`) and remarks.

    `terminal` names the columns that the terminal shows; None leaves the section out there.
    """

    title: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    remarks: tuple[str, ...] = ()
    text_columns: tuple[int, ...] = (0,)
    terminal: tuple[int, ...] | None = None


def save_report(run_dir: Path, report: Report) -> None:
    """Write report.json, and report.md and report.html derived from it. Each file is replaced as a whole."""
    atomic_write(run_dir / REPORT, (report.model_dump_json(indent=2) + "\n").encode())
    atomic_write(run_dir / "report.md", markdown(report).encode())
    atomic_write(run_dir / "report.html", html(report).encode())


def sections(report: Report) -> list[Section]:
    """Return what there is to show, most important first; a section without content is left out."""
    found = [
        _result(report),
        _latency(report),
        _parity(report),
        _engines(report),
        _widths(report),
        _stages(report),
        Section("What was left out and why", remarks=tuple(report.notes), terminal=()),
        _facts("How it was measured", report.measurement),
        _facts("Where it was measured", report.environment),
    ]
    return [section for section in found if section.rows or section.remarks]


def markdown(report: Report) -> str:
    """Return report.md."""
    lines = [f"# {report.model}: dense and pruned", "", f"**{verdict(report)}**", "", _subject(report), ""]
    for section in sections(report):
        lines += [f"## {section.title}", ""]
        if section.rows:
            rules = ["---" if i in section.text_columns else "---:" for i in range(len(section.header))]
            lines += [_markdown_row(row) for row in (section.header, rules, *section.rows)] + [""]
        lines += [f"- {remark}" for remark in section.remarks] + ([""] if section.remarks else [])
    return "\n".join(lines).rstrip() + "\n"


def html(report: Report) -> str:
    """Return report.html: one self-contained page, readable on a phone, light or dark as the reader prefers."""
    template = files("deploy").joinpath("templates", "report.html").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(report=report, verdict=verdict(report), subject=_subject(report), sections=sections(report))
    )


def terminal(report: Report) -> Group:
    """Return what `rich` prints: the verdict and the tables that decide, at most 80 columns wide."""
    parts: list[RenderableType] = [Text(verdict(report), style="bold"), Text("")]
    for section in sections(report):
        if section.terminal is None:
            continue
        if section.rows:
            table = Table(box=box.SIMPLE_HEAD, title=section.title, title_justify="left", pad_edge=False)
            for column in section.terminal:
                text = column in section.text_columns
                table.add_column(
                    section.header[column], justify="left" if text else "right", overflow="fold", no_wrap=not text
                )
            for row in section.rows:
                table.add_row(*(Text(row[column]) for column in section.terminal))
            parts.append(table)
        elif section.remarks:
            parts.append(Text(section.title, style="italic"))
        parts += [Text(f"- {remark}") for remark in section.remarks]
        parts.append(Text(""))
    return Group(*parts[:-1])


def _subject(report: Report) -> str:
    asked = f"ratio {report.ratio:g}" if report.ratio is not None else _inline(report.plan.asked if report.plan else {})
    return f"Model {report.model}, weights {report.weights}, data {report.data}, {asked or 'no pruning asked for'}."


def _result(report: Report) -> Section:
    dense, pruned = report.dense, report.pruned
    rows = [
        ("parameters", f"{dense.params:,}", f"{pruned.params:,}", _ratio(dense.params, pruned.params)),
        ("MACs per image", f"{dense.macs:,}", f"{pruned.macs:,}", _ratio(dense.macs, pruned.macs)),
        ("top-1 after pruning, %", _percent(dense.top1), _percent(pruned.top1_after_prune),
         _points(dense.top1, pruned.top1_after_prune)),
        ("top-1 after fine-tuning, %", _percent(dense.top1), _percent(pruned.top1), _points(dense.top1, pruned.top1)),
    ]  # fmt: skip
    if pruned.agreement is not None:
        rows.append(("same top-1 as dense, %", "", _percent(pruned.agreement), ""))
    gap = shortfall(report)
    return Section(
        "Result",
        ("", "dense", "pruned", "change"),
        tuple(rows),
        remarks=(gap,) if gap else (),
        terminal=(0, 1, 2, 3),
    )


def _latency(report: Report) -> Section:
    found = comparisons(report)
    rows = tuple(
        (
            f"{c.runtime} {c.precision}",
            f"{c.batch}",
            _ms(c.dense.median),
            _ms(c.pruned.median),
            f"{c.speedup:.2f}x",
            "" if c.low is None or c.high is None else f"{c.low:.2f} to {c.high:.2f}",
            f"{c.pruned.images_per_s:,.0f}",
            f"{_ms(c.dense.p90)} / {_ms(c.pruned.p90)}",
            f"{_ms(c.dense.p99)} / {_ms(c.pruned.p99)}",
            f"{100 * c.dense.cv:.1f} / {100 * c.pruned.cv:.1f}",
            "" if c.dense.threads is None else f"{c.dense.threads} / {c.pruned.threads}",
        )
        for c in found
    )
    unstable = [
        f"{c.runtime} {c.precision} at batch {c.batch}" for c in found if max(c.dense.cv, c.pruned.cv) > UNSTABLE_CV
    ]
    remark = f"Unstable (spread above {100 * UNSTABLE_CV:g} %), something else was running: {', '.join(unstable)}."
    return Section(
        "Latency",
        (
            "runtime",
            "batch",
            "dense ms",
            "pruned ms",
            "faster",
            "range",
            "images/s",
            "p90 ms",
            "p99 ms",
            "CV %",
            "threads",
        ),
        rows,
        remarks=(remark,) if unstable else (),
        terminal=(0, 1, 2, 3, 4, 6),
    )


def _parity(report: Report) -> Section:
    return Section(
        "Parity",
        ("model", "candidate", "against", "images", "max abs", "cosine", "same top-1, %", "gate"),
        tuple(
            (
                p.model,
                p.candidate,
                p.reference,
                f"{p.images}",
                f"{p.max_abs:.1e}",
                f"{p.min_cosine:.6f}",
                _percent(p.top1_agreement),
                "passed" if p.passed else "failed",
            )
            for p in report.parity
        ),
        text_columns=(0, 1, 2, 7),
        terminal=(0, 1, 4, 6, 7),
    )


def _engines(report: Report) -> Section:
    return Section(
        "Engines",
        ("model", "runtime", "target", "MB", "build s", "file"),
        tuple(
            (e.model, f"{e.runtime} {e.precision}", e.target, f"{e.bytes / 1e6:.1f}", f"{e.seconds:.1f}", e.path)
            for e in report.engines
        ),
        text_columns=(0, 1, 2, 5),
        terminal=(0, 1, 2, 3, 4),
    )


def _widths(report: Report) -> Section:
    if report.plan is None:
        return Section("Widths")
    return Section(
        "Widths",
        ("group", "before", "after"),
        tuple((w.group, f"{w.before}", f"{w.after}") for w in report.plan.widths),
        remarks=(f"Asked for: {_inline(report.plan.asked)}.", f"Got: {_inline(report.plan.got)}."),
    )


def _stages(report: Report) -> Section:
    return Section(
        "Stages",
        ("stage", "seconds", "peak MB", ""),
        tuple(
            (s.name, f"{s.seconds:.1f}", f"{s.peak_rss_mb:,.0f}", "already there" if s.skipped else "")
            for s in report.stages
        ),
        text_columns=(0, 3),
        terminal=(0, 1, 2, 3),
    )


def _facts(title: str, facts: dict[str, Any]) -> Section:
    rows = tuple((name, _inline(value)) for name, value in facts.items() if value not in (None, "", [], {}))
    return Section(title, ("", ""), rows, text_columns=(0, 1))


def _inline(value: Any) -> str:
    """A JSON value in a line that people can read."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_inline(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_inline, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else f"{value}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _ms(value: float) -> str:
    """Milliseconds with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _points(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.2f}"


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.2f}x less"
