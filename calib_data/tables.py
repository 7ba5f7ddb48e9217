"""Lists of files and labels: CSV, TSV, lines of JSON, and text with a file and a label a line."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated

from pydantic import FailFast, RootModel

from upvits.calib_data.columns import IMAGE_COLUMNS, LABEL_COLUMNS, Columns, is_number, label_text, only_label
from upvits.calib_data.datasets import DataSource
from upvits.calib_data.decoding import PICTURES
from upvits.calib_data.documents import parse_document, read_regular, require_memory
from upvits.calib_data.errors import UserError
from upvits.calib_data.folders import TRAIN_NAMES, VAL_NAMES
from upvits.calib_data.labelled import File, Splits, open_files
from upvits.calib_data.paths import relative_path
from upvits.calib_data.printable import printable

_LOGGER = logging.getLogger(__name__)

_LARGEST = 1 << 29
"""Bytes of a table."""

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json")
_SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_ENDINGS = ("", ".jpg", ".jpeg", ".png")
_FIX = "Give a table with the columns file and label (CSV, TSV), or JSON lines with these entries."

Row = dict[str, object]


class _Line(RootModel[dict[str, object]]):
    """One line of JSON."""


class _Lines(RootModel[list[dict[str, object]]]):
    """A list in JSON."""

    root: Annotated[list[dict[str, object]], FailFast()]  # within the brackets above, it has to be hashable


def open_table(
    spec: str,
    place: Path,
    columns: Columns,
    *,
    known: Collection[str] = (),
    quiet: bool = True,
    recheck: bool = False,
) -> DataSource:
    """Opens a table of files and labels, or a folder with one for training and perhaps one for validation.

    Paths are relative to the folder of the table, or to the one folder in it where the files lie; absolute ones are
    below it, or were on another machine. Labels are names, or numbers from 0 on. A column `split` divides the rows.

    Args:
        known: names of the network's classes or of a class map, see `open_files`.
        recheck: likewise.

    Raises:
        UserError: there is no such table; columns, files or labels are missing; files lie outside of its folder.
    """
    if place.is_dir():
        found = {path.stem.lower(): path for path in sorted(place.iterdir()) if path.suffix.lower() in SUFFIXES}
        train = next((path for name in TRAIN_NAMES for stem, path in found.items() if name in stem), None)
        val = next((path for name in VAL_NAMES for stem, path in found.items() if name in stem and path != train), None)
        if train is None:
            raise UserError(f"No table for training in {place}.", why=f"Looked for train{SUFFIXES[0]}.", fix=_FIX)
        root = place
    else:
        train, val, root = place, None, place.parent
    files = _files(train, columns)
    splits = _by_split_column(files) if val is None else ([f for _, f in files], [f for _, f in _files(val, columns)])
    notes: tuple[str, ...] = ()
    if splits[1] and all(f.class_name is None for f in splits[1]) and any(f.class_name for f in splits[0]):
        notes = (f"{len(splits[1])} images for validation have no labels and were left out.",)
        splits = splits[0], []
    labels = {file.class_name for split in splits for file in split}
    if None in labels and len(labels) > 1:
        raise UserError(f"Some rows of {train} have no label.", fix="Label all or none.")
    names = {name for name in labels if name is not None}
    numbered = all(is_number(name) for name in names) and {int(name) for name in names} == set(range(len(names)))
    both = Splits(*splits, numbered=numbered, notes=notes)
    return open_files(spec, root, both, known, quiet=quiet, recheck=recheck)


def _by_split_column(files: list[tuple[str, File]]) -> tuple[list[File], list[File]]:
    """Training and validation files by their split; without one all are for training."""
    names = {split for split, _ in files}
    if not names & {*TRAIN_NAMES, *VAL_NAMES}:
        return [file for _, file in files], []
    validation = next((name for name in VAL_NAMES if name in names), None)
    train = [file for split, file in files if split in TRAIN_NAMES]
    return train, [file for split, file in files if split == validation]


def _files(path: Path, columns: Columns) -> list[tuple[str, File]]:
    """Split and file of every row."""
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path} has no rows.", fix=_FIX)
    names = list(rows[0])
    image = columns.image or next((n for known in IMAGE_COLUMNS for n in names if n.lower() == known), None)
    if image is None or image not in names:
        shown = ", ".join(printable(name, 40) for name in names[:12])
        raise UserError(
            f"Which column of {path} names the files?", why=f"It has {shown}.", fix='Name it: `image_column="NAME"`.'
        )
    label = None
    if columns.label != "none" and (columns.label or len(names) > 1):
        others = [name for name in names if name != image]
        label = only_label(others, str(path), columns.label)
    split = next((name for name in names if name.lower() in _SPLIT_COLUMNS and name not in (image, label)), None)
    texts = [_text(row.get(image), path) for row in rows]
    places = _places(texts, path)
    files = []
    for row, place in zip(rows, places, strict=True):
        value = None if label is None else row.get(label)
        name = None if value in (None, "") else label_text(_plain(value), f"{path}: {label} of {place.name}")
        files.append((str(row.get(split, "")).strip().lower() if split else "", File(str(place), name)))
    return files


def _plain(value: object) -> object:
    """Numbers in text without zeros before them, and 3.0 as 3: spreadsheets write them so."""
    if isinstance(value, str):
        text = value.strip()
        if text.isdecimal() and len(text) < 10:
            return int(text)
        whole, dot, rest = text.partition(".")
        if dot and whole.isdecimal() and len(whole) < 10 and set(rest) <= {"0"}:
            return int(whole)
    return value


def _text(value: object, path: Path) -> str:
    if not isinstance(value, (str, int)) or value == "":
        raise UserError(f"A row of {path} names no file.", why=f"It has {printable(repr(value), 60)}.", fix=_FIX)
    return str(value)


def _places(texts: list[str], path: Path) -> list[Path]:
    """The files of the rows, below the table's folder; the first row shows in which folder and with which ending."""
    folder = path.parent
    try:
        names = [relative_path(name) for name in _from_folder(texts, path)]
    except ValueError as error:
        raise UserError(
            f"{path} names a file that is not below {folder}.",
            why=f"{error}.",
            fix="Give paths from there, or put the table into the folder above all of its files.",
        ) from error
    bases = [folder, *sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))]
    for base in bases:
        for ending in _ENDINGS:
            if os.path.isfile(base / f"{names[0]}{ending}"):  # False, too, where the ending makes a name too long
                found = [base / f"{name}{ending}" for name in names]
                missing = [file for file in found if not os.path.isfile(file)]
                if missing:
                    raise UserError(
                        f"{len(missing)} of {len(found)} files of {path} are missing, for example {missing[0]}.",
                        fix="Add them, or remove their rows.",
                    )
                return found
    raise UserError(
        f"The files of {path} are not there, for example {names[0]}.",
        why=f"Looked in {folder} and the folders in it.",
        fix="Give paths from the folder of the table.",
    )


def _from_folder(texts: Sequence[str], path: Path) -> list[str]:
    """Paths as they are seen from the table's folder. What absolute ones share is left out where it is that folder, or
    where it belongs to another machine and what follows it lies below the folder.

    Raises:
        UserError: absolute paths name files that are elsewhere on this machine.
    """
    folder = path.parent.absolute()
    plain = [text.replace("\\", "/") for text in texts]
    if not all(text.startswith("/") or PureWindowsPath(text).drive for text in plain):
        return plain
    shared = PurePosixPath(os.path.commonpath([text.rpartition("/")[0] or "/" for text in plain]))
    if shared.is_relative_to(folder):
        return [text.removeprefix(f"{folder}/") for text in plain]
    if os.path.lexists(plain[0]):
        raise UserError(
            f"{path} names files below {shared}, for example {plain[0]}.",
            why="Files are read from the folder of the table alone, since a table may come from somebody else.",
            fix=f"Copy the table into {shared}, and give that copy: its paths may stay as they are.",
        )
    for start in (*reversed(shared.parents), shared):  # the longest path that is here
        found = [text[len(f"{start}".rstrip("/")) + 1 :] for text in plain]
        if os.path.isfile(folder / found[0]):
            _LOGGER.info("%s: paths begin with %s, and are looked for in %s.", path, start, folder)
            return found
    raise UserError(
        f"{path} names files that are not on this machine, for example {plain[0]}.",
        why=f"No end of this path is a file below {folder}.",
        fix="Put the table into the folder of its pictures.",
    )


def _rows(path: Path) -> Iterator[Row]:
    try:
        text = read_regular(path, fix=_FIX, largest=_LARGEST).decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"{path} is no text.", why=f"{error}.", fix=_FIX) from error
    require_memory(text, str(path), fix=_FIX, rows=True)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        yield from parse_document(text, str(path), _Lines, fix=_FIX, plain=False).root
    elif path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield parse_document(line, f"{path}, line {number}", _Line, fix=_FIX).root
    else:
        yield from _table(text, path)


def _table(text: str, path: Path) -> Iterator[Row]:
    lines = [line for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    delimiter = next((sign for sign in ",;\t" if sign in first), " ")
    if delimiter == " ":  # a file and a label a line; files may have spaces in their names
        cells = [line.rsplit(maxsplit=1) for line in lines]
    else:
        try:
            cells = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if any(row)]
        except csv.Error as error:
            raise UserError(f"{path} is no table.", why=f"{error}.", fix=_FIX) from error
    if not cells:
        return
    names = [cell.strip() for cell in cells[0]]
    lowered = {name.lower() for name in names}
    if lowered & {*IMAGE_COLUMNS, *LABEL_COLUMNS} or not any(Path(name).suffix.lower() in PICTURES for name in names):
        header, cells = names, cells[1:]
    else:
        header = ["file", "label", "split"][: len(names)]
    strange = next((number for number, row in enumerate(cells, 2) if len(row) != len(header)), None)
    if strange is not None or len(set(header)) < len(header):
        raise UserError(
            f"{path} is no table of {len(header)} columns" + (f": see row {strange}." if strange else "."),
            why=f"Its first row is {printable(', '.join(names), 200)}.",
            fix=_FIX,
        )
    for row in cells:
        yield dict(zip(header, row, strict=True))
