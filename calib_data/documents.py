"""JSON documents that may come from strangers: read as data, checked against a schema, and refused in one message."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular, unusable
from upvits.calib_data.printable import printable

Document = TypeVar("Document", bound=BaseModel)

_LARGEST = 64 << 20
"""Bytes. The largest document that this tool writes, with the names of 100,000 classes, has a tenth of it."""


def read_document(path: Path, kind: type[Document], *, fix: str) -> Document:
    """The document in a JSON file.

    Args:
        path: of the file.
        kind: schema that it has to fit; values are not converted (a number in quotes is no number).
        fix: what to do when the file is no such document.

    Raises:
        UserError: names the file, the entry that is wrong, and `fix`.
    """
    return parse_document(read_regular(path, fix=fix), str(path), kind, fix=fix)


def parse_document(text: bytes | str, name: str, kind: type[Document], *, fix: str) -> Document:
    """The document in JSON text that was read from `name`; raises like `read_document`."""
    try:
        return kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(
            f"{name} is not valid.", why=f"{printable(where, 300)}: {printable(first['msg'], 300)}.", fix=fix
        ) from error


def read_regular(path: Path, *, fix: str, largest: int = _LARGEST) -> bytes:
    """The bytes of a regular file: a pipe would wait for ever, a device never end.

    Raises:
        UserError: it is absent, no regular file, unreadable, or larger than `largest` bytes.
    """
    size = require_regular(path, fix=fix).st_size
    if size > largest:
        raise UserError(
            f"{path} has {size / 2**20:,.0f} MiB.",
            why=f"No file of this kind has more than {largest >> 20} MiB.",
            fix=fix,
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise unusable(path, error, fix) from error
