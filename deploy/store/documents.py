"""JSON records of a run: written whole, and read again by later stages and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from upvits.calib_data.documents import read_document
from upvits.deploy.store.artifacts import atomic_write

Record = TypeVar("Record")

AGAIN = "Delete its folder and run `upvits-deploy build` with the same output: that stage is done again."


def save_document(path: Path, document: BaseModel) -> None:
    """Write a record as JSON; the file appears whole or not at all."""
    atomic_write(path, (json.dumps(document.model_dump(by_alias=True), indent=2) + "\n").encode())


def load_document(path: Path, kind: type[Record], *, strict: bool = True) -> Record:
    """The record of this kind in a JSON file; not `strict` for those that also read an older form.

    Raises:
        UserError: the file cannot be read, is damaged, or is of another version; says which entry is wrong.
    """
    return read_document(path, kind, fix=AGAIN, strict=strict)
