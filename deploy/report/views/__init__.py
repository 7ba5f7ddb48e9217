"""What people read of a report: Markdown, one HTML page, and tables for an 80-column terminal.

All three show the same sections (`sections`); the terminal leaves out some of the sections and columns, and the page
adds charts of the same figures.
"""

from __future__ import annotations

from pathlib import Path

from upvits.deploy.report.document import REPORT, Report
from upvits.deploy.report.views.page import html
from upvits.deploy.report.views.text import markdown, sections, terminal
from upvits.deploy.store.artifacts import atomic_write

__all__ = ["html", "markdown", "save_report", "sections", "terminal"]


def save_report(run_dir: Path, report: Report) -> None:
    """Write report.json, and report.md and report.html derived from it. Each file is replaced as a whole."""
    atomic_write(run_dir / REPORT, (report.model_dump_json(indent=2) + "\n").encode())
    atomic_write(run_dir / "report.md", markdown(report).encode())
    atomic_write(run_dir / "report.html", html(report).encode())
