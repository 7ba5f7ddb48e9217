"""Which column of a table, or entry of a document, is the picture and which the label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upvits.calib_data.errors import UserError
from upvits.calib_data.printable import printable

IMAGE_COLUMNS = (
    "file_name", "filename", "file", "path", "filepath", "file_path", "image", "image_path", "image_file", "img",
    "img_path", "image_name", "image_id", "id",
)  # fmt: skip
_LONGEST = 1_000
"""Characters of a label."""

LABEL_COLUMNS = (
    "label", "labels", "class", "cls", "class_id", "class_name", "class_label", "category", "category_id", "target",
    "label_id", "label_name", "y",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Columns:
    """What somebody asked for; None: to be found. The label "none": there are no labels."""

    image: str | None = None
    label: str | None = None


def only_label(columns: Iterable[str], place: str, asked: str | None) -> str:
    """The column that holds labels: the one that was asked for, or the only one that is called like labels.

    Raises:
        UserError: there is none, or several.
    """
    columns = list(columns)
    names = ", ".join(printable(column, 40) for column in columns[:12]) or "nothing"
    if asked is not None:
        if asked not in columns:
            raise UserError(f"{place} has no {asked}.", why=f"It has {names}.", fix="Correct `label_column=`.")
        return asked
    fitting = [column for column in columns if column.lower() in LABEL_COLUMNS]
    if len(fitting) != 1:
        raise UserError(
            f"Which part of {place} is the label?",
            why=f"Several may be: {', '.join(fitting)}." if fitting else f"It has {names}.",
            fix=f'Name it: `label_column="{(fitting or ["NAME"])[0]}"`; `label_column="none"` reads no labels.',
        )
    return fitting[0]


def label_text(value: object, place: str) -> str:
    """A label as text: a whole number from 0 on, or a name.

    Raises:
        UserError: it is anything else.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    if (
        isinstance(value, str)
        and len(value) <= _LONGEST
        and value.strip()
        and value.isprintable()
        and (not is_number(value.strip()) or value.strip().isdecimal())
    ):
        return value.strip()
    raise UserError(
        f"{place} is no label: {printable(repr(value), 60)}.",
        why="A label is a whole number from 0 on, or the name of a class.",
        fix="Correct it, or name another one with `label_column=`.",
    )


def is_number(text: str) -> bool:
    """Whether text is a number of any kind, or made of signs that are digits.

    >>> [is_number(text) for text in ("12", "-1.5", "cat", "n01440764")]
    [True, True, False, False]
    """
    try:
        float(text)
    except ValueError:
        return text.isdigit()
    return text.lower().strip("+-") not in ("nan", "inf", "infinity")
