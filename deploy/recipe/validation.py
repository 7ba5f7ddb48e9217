"""Values that people gave, made into documents; what is wrong with them in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from upvits.calib_data.errors import UserError

Document = TypeVar("Document", bound=BaseModel)


def validated(document: type[Document], values: Mapping[str, Any], what: str, command: str) -> Document:
    """A document of these values.

    Args:
        document: its type.
        values: by name of the field.
        what: the first words of the message, e.g. "The recipe is not valid".
        command: whose `--help` explains the values.

    Raises:
        UserError: a value is out of range, of the wrong type, or unknown.
    """
    try:
        return document.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_fault(one["loc"], one["msg"], one["input"]) for one in error.errors()[:4])
        raise UserError(f"{what}: {faults}.", fix=f"`{command} --help` explains the options.") from error


def _fault(place: tuple[int | str, ...], message: str, given: object) -> str:
    """One fault in words; without a place it is about several values together, and our own sentence."""
    if not place:
        return message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, place))}: {message} (got {given!r})"
