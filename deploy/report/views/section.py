"""What a view shows: sections of text and tables, and one way to write every kind of number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as people read it, and as the report has it; tables sort by `value`."""

    text: str
    value: float | None = None


Row: TypeAlias = tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """Two lengths as shares of the longest bar, 0 to 1; None where a model has no such thing."""

    dense: float | None
    pruned: float | None


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a table and remarks.

    Attributes:
        key: what it is about; `part` tells several sections of one kind apart.
        text_columns: columns of words; the others are numbers.
        remarks: sentences under the table.
        terminal: columns that the terminal shows; None: the terminal does not show the section.
        sortable: readers may want another order of the rows.
        shown: so many rows come first, the others on demand; None shows all.
        bars: drawn beside the rows in HTML.
        groups: rows with equal names stand together under that name in HTML.
        commands: lines to type.
    """

    key: str
    title: str
    header: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    remarks: tuple[str, ...] = ()
    text_columns: tuple[int, ...] = (0,)
    terminal: tuple[int, ...] | None = None
    sortable: bool = False
    shown: int | None = None
    bars: tuple[Bar, ...] = ()
    groups: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    part: str = ""

    @property
    def anchor(self) -> str:
        """Its name in HTML."""
        return f"{self.key}-{self.part}" if self.part else self.key


def without_empty_columns(section: Section) -> Section:
    """The section without columns that have no text in any row."""
    kept = [i for i in range(len(section.header)) if any(row[i].text for row in section.rows)]
    place = {column: number for number, column in enumerate(kept)}
    return replace(
        section,
        header=tuple(section.header[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in section.rows),
        text_columns=tuple(place[i] for i in section.text_columns if i in place),
        terminal=section.terminal and tuple(place[i] for i in section.terminal if i in place),
    )


def words(text: str) -> Cell:
    """A cell that is not a number."""
    return Cell(text)


def count(value: int | None) -> Cell:
    """A whole number in full."""
    return Cell("") if value is None else Cell(f"{value:,}", value)


def ms(value: float | None) -> Cell:
    """Milliseconds with three significant digits."""
    return Cell("") if value is None else Cell(three_digits(value), value)


def fine_ms(value: float | None) -> Cell:
    """Milliseconds with three decimals, for layers, which stand next to each other."""
    return Cell("") if value is None else Cell(f"{value:.3f}", value)


def percent(value: float | None) -> Cell:
    """Percent with two decimals."""
    return Cell("") if value is None else Cell(f"{value:.2f}", value)


def points(value: float | None) -> Cell:
    """A change in percentage points, always with its sign."""
    return Cell("") if value is None else Cell(signed(value), value)


def times(value: float | None) -> Cell:
    """A factor."""
    return Cell("") if value is None else Cell(f"{value:.2f}x", value)


def decibels(value: float | None) -> Cell:
    """A signal-to-noise ratio in dB."""
    return Cell("") if value is None else Cell(f"{value:.1f}", value)


def megabytes(value: int | None) -> Cell:
    """Bytes, shown in MB (10**6)."""
    return Cell("") if value is None else Cell(f"{value / 1e6:.1f}", value)


def seconds(value: float) -> Cell:
    """Seconds with one decimal."""
    return Cell(f"{value:.1f}", value)


def signed(value: float) -> str:
    """Two decimals with a sign; what rounds to zero has none."""
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def short_count(value: float) -> str:
    """A large number with three significant digits and its unit: 43.3 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{three_digits(value / size)} {unit}"
    return f"{value:g}"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent, three decimals at most."""
    if value >= 9.995:
        return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.0995 or value == 0 else f"{value:.3f}"


def counts(by_name: Mapping[str, int]) -> str:
    """Counts by name in words: 48 int8, 2 fp16."""
    return ", ".join(f"{number} {name}" for name, number in by_name.items() if number)


def inline(value: Any) -> str:
    """A JSON value in a line that people can read."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {inline(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(inline, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else f"{value}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
