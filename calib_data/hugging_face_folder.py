"""A data set of Hugging Face in a local folder, checked before their library reads it.

Such folders travel between people, and the library follows what stands in their documents: addresses, paths to
elsewhere, files with names of classes. What leads out of the folder, or fills memory before a picture is seen, is
refused here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from upvits.calib_data.documents import Name, parse_json, read_document, read_regular, require_plain
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.paths import RelativePath, relative_path
from upvits.calib_data.printable import printable

_FIX = "Get the folder again from where it came from, or give its pictures as imagefolder:DIR or csv:FILE."
_MOST_FILES = 2_000_000
_DEEPEST = 40
_LARGEST_CARD = 1 << 20
READERS = ("parquet", "arrow", "imagefolder", "json", "csv")
"""The library's readers that are used. It has others, for archives, recordings, proteins, documents."""

_PLACES = ("data_files", "data_dir")
"""Entries of a configuration that name files."""

_FILLS_MEMORY = ("names_file", "num_classes")
"""Entries of a list of classes: names are read from another file, or counted up. The library writes neither."""


class _File(BaseModel):
    filename: RelativePath


class _State(BaseModel):
    """`state.json` of `save_to_disk`: the tables of one split."""

    model_config = ConfigDict(extra="ignore")

    data_files: Annotated[tuple[_File, ...], Field(alias="_data_files", min_length=1, max_length=100_000)]


class _Splits(BaseModel):
    """`dataset_dict.json` of `save_to_disk`: a folder for each split."""

    splits: Annotated[tuple[Annotated[Name, RelativePath], ...], Field(min_length=1, max_length=1_000)]


def check_folder(folder: Path) -> None:
    """Refuse a folder that is more than a data set of its own.

    Raises:
        UserError: names the file.
    """
    for path in _files(folder):
        require_regular(path, fix=_FIX)
        if path.name == "state.json":
            read_document(path, _State, fix=_FIX)
        elif path.name == "dataset_dict.json":
            read_document(path, _Splits, fix=_FIX)
        elif path.name == "dataset_info.json":
            _check_entries(parse_json(read_regular(path, fix=_FIX), str(path), fix=_FIX), path)
        elif path.suffix in (".arrow", ".parquet"):
            _check_table(path)
    for name in ("README.md", ".huggingface.yaml"):
        if (folder / name).exists():
            _check_card(folder / name)


def _files(folder: Path) -> Iterator[Path]:
    count = 0
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                count += 1
                if count > _MOST_FILES or depth > _DEEPEST:
                    raise UserError(f"{folder} holds too many files, or folders in a circle.", fix=_FIX)
                if entry.is_dir():
                    waiting.append((Path(entry), depth + 1))
                else:
                    yield Path(entry)


def _check_table(path: Path) -> None:
    """What a table says about its columns, in JSON: the library takes it for its own document."""
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path) if path.suffix == ".parquet" else _arrow_schema(path)
    except Exception as error:  # whatever a damaged file makes pyarrow say
        raise UserError(
            f"{path} is no table.", why=f"{printable(str(error).partition(chr(10))[0], 200)}.", fix=_FIX
        ) from error
    said = (schema.metadata or {}).get(b"huggingface")
    if said is not None:
        _check_entries(parse_json(said, str(path), fix=_FIX), path)


def _arrow_schema(path: Path) -> Any:
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as file:
        try:
            return pyarrow.ipc.open_stream(file).schema
        except pyarrow.ArrowInvalid:
            file.seek(0)
            return pyarrow.ipc.open_file(file).schema


def _check_card(path: Path) -> None:
    """The block of YAML at the top of a README: which files belong to which split, and what is in the columns."""
    import yaml  # of the library

    text = read_regular(path, fix=_FIX, largest=_LARGEST_CARD).decode(errors="replace")
    if path.suffix == ".md":
        lines = text.splitlines()
        end = next((number for number, line in enumerate(lines[1:], 1) if line == "---"), 0)
        text = "\n".join(lines[1:end]) if lines[:1] == ["---"] else ""
    try:
        values = yaml.safe_load(text)
        require_plain([values])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"The card {path} is not valid.", why=f"{printable(str(error), 200)}.", fix=_FIX) from error
    if isinstance(values, dict):
        _check_entries(values.get("dataset_info"), path)
        _check_places(values.get("configs"), path)


def _check_entries(value: Any, path: Path) -> None:
    """What is said of the columns."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            for key in _FILLS_MEMORY:
                if isinstance(inner.get(key), (int, str)):  # and no column of that name
                    raise UserError(
                        f"{path} describes classes by {key}.", why="Their names have to stand there.", fix=_FIX
                    )
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner


def _check_places(value: Any, path: Path, named: bool = False) -> None:
    """Texts below `data_files` and `data_dir` are paths below the folder, patterns with `*` among them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_places(inner, path, named or key in _PLACES)
    elif isinstance(value, list):
        for inner in value:
            _check_places(inner, path, named)
    elif named and isinstance(value, str):
        try:
            relative_path(value)
            outside = ":" in value
        except ValueError:
            outside = value not in (".", "./")
        if outside:
            raise UserError(
                f"{path} names files outside of its folder: {printable(value, 100)}.",
                why="What a data set says is not followed to other places or to the network.",
                fix=_FIX,
            )
