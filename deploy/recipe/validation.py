"""Values that people gave, made into recipes; what is wrong with them is said in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from upvits.calib_data.errors import UserError

Document = TypeVar("Document", bound=BaseModel)


def validated(document: type[Document], values: Mapping[str, Any], command: str) -> Document:
    """A recipe of these values.

    Args:
        document: its type.
        values: by name of the field.
        command: whose `--help` explains the values.

    Raises:
        UserError: a value is out of range, of the wrong type, or unknown.
    """
    try:
        return document.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_fault(fault["loc"], fault["msg"], fault["input"]) for fault in error.errors()[:4])
        raise UserError(
            f"The recipe is not valid: {faults}.", fix=f"`{command} --help` explains the options."
        ) from error


def _fault(place: tuple[int | str, ...], message: str, given: object) -> str:
    """One fault in words; a fault without a place is about several values together, and is a sentence of ours."""
    if not place:
        return message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, place))}: {message} (got {given!r})"
