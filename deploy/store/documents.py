"""JSON documents of a run: written whole, and checked against their schema when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from upvits.calib_data.errors import UserError
from upvits.deploy.store.artifacts import atomic_write

Document = TypeVar("Document", bound=BaseModel)

_AGAIN = "Delete its folder and run `upvits-deploy build` with the same output: that stage is done again."


def write_document(path: Path, document: BaseModel) -> None:
    """Write a document as JSON; the file appears whole or not at all."""
    atomic_write(path, (json.dumps(document.model_dump(by_alias=True), indent=2) + "\n").encode())


def read_document(path: Path, kind: type[Document]) -> Document:
    """The document of this kind in a JSON file.

    Raises:
        UserError: the file cannot be read, is damaged, or is of another version; says which entry is wrong.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}", why=f"The system says: {error.strerror}.", fix=_AGAIN) from error
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format_version",):
            raise UserError(
                f"{path} was written by another version of this tool",
                why=f"Its format_version is {first['input']!r}.",
                fix=_AGAIN,
            ) from error
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is damaged", why=f"{where}: {first['msg']}.", fix=_AGAIN) from error
