"""What `upvits-deploy bench` says: the document that --output writes, and its table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upvits.calib_data.documents import Facts, Name, Natural, Number, Positive, read_document
from upvits.calib_data.documents import Text as LongText
from upvits.calib_data.errors import UserError
from upvits.deploy.measure.document import Environment, Latency


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ComparedModel(_Document):
    """One model in one runtime; `name` is unique, `label` without the runtime. `session` is what it ran with."""

    name: Name
    label: Name
    path: Name
    runtime: Name
    precision: Name
    session: Facts


class Figure(_Document):
    """One model at one batch size.

    `speedup` is how many times faster than the first model it is: the median over rounds of the ratio of medians
    within a round; `low` and `high` the 10th and 90th percentile over rounds. `rounds_ms` are those medians.
    """

    name: Name
    batch: Natural
    latency: Latency
    drift: Number
    speedup: Number
    low: Number
    high: Number
    rounds_ms: list[Number]


class StreamFigure(_Document):
    """Images per second of so many sessions of one model at the same time."""

    name: Name
    batch: Natural
    streams: Natural
    images_per_s: Positive


class Skip(_Document):
    """An engine that was not measured, and why."""

    name: Name
    why: LongText


class Comparison(_Document):
    """What was compared, on what, and how. Latency in milliseconds per call; inputs are random numbers."""

    format_version: Literal[1] = 1
    reference: Name
    models: list[ComparedModel]
    figures: list[Figure]
    throughput: list[StreamFigure]
    skipped: list[Skip]
    warnings: list[LongText]
    measurement: Facts
    gpu: Facts
    environment: Environment


def check_output(output: Path, targets: Sequence[Path]) -> None:
    """Refuse a file for the figures that cannot be written, or that is something else already.

    Raises:
        UserError: it is, or lies in, one of the targets, is a folder or a file that holds no comparison, or its
            folder does not exist or cannot be written.
    """
    whole = output.resolve()
    if any(target.resolve() in (whole, *whole.parents) for target in targets):
        raise UserError(
            f"{output} is, or lies in, what is to be measured",
            why="Writing figures there could destroy it.",
            fix="Choose another --output.",
        )
    try:
        if not output.parent.is_dir():
            raise UserError(f"there is no folder {output.parent}", fix="Make it first, or choose another --output.")
        if output.is_dir():
            raise UserError(f"{output} is a folder", fix=f"Name a file, for example --output {output / 'bench.json'}.")
        if output.exists() and not _is_comparison(output):
            raise UserError(
                f"{output} exists and holds no comparison",
                why="Writing the figures there would overwrite something of yours.",
                fix="Choose another --output, or move this file away.",
            )
        # the same kind of draft that is renamed at the end
        with tempfile.NamedTemporaryFile(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent):
            pass
    except OSError as error:
        why = f"The system says: {error.strerror}."
        raise UserError(f"cannot write {output}", why=why, fix="Choose another --output.") from error


def _is_comparison(file: Path) -> bool:
    try:
        read_document(file, Comparison, fix="")
    except UserError:
        return False
    return True


def comparison_table(comparison: Comparison) -> RenderableType:
    """Show a comparison on 80 columns."""
    models = {entry.name: entry for entry in comparison.models}
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 1), header_style="bold")
    table.add_column("model", overflow="fold", min_width=12)
    table.add_column("runtime", overflow="fold")
    table.add_column("type", overflow="fold")
    for name in ("batch", "median ms", "p99 ms", "CV %", "images/s", "faster"):
        table.add_column(name, justify="right")
    for figure in comparison.figures:
        entry, latency = models[figure.name], figure.latency
        table.add_row(
            Text(entry.label),
            entry.runtime,
            entry.precision,
            str(figure.batch),
            _three_digits(latency.median),
            _three_digits(latency.p99),
            f"{100 * latency.cv:.1f}",
            _three_digits(latency.images_per_s),
            "-" if figure.name == comparison.reference else f"{figure.speedup:.2f}x",
        )
    lines = [f"{entry.name}, batch {entry.batch}, {entry.streams} streams: {entry.images_per_s:.0f} images/s"
             for entry in comparison.throughput]  # fmt: skip
    lines += [f"not measured: {entry.name}: {entry.why}" for entry in comparison.skipped]
    return Group(table, *(Text(line) for line in [*lines, *comparison.warnings]))


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
