"""Values that people gave, made into recipes; what is wrong with them is said in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

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
    fix = f"`{command} --help` explains the options."
    if truths := list(_truths(document, values)):  # pydantic takes true for 1
        raise UserError(f"The recipe is not valid: {'; '.join(truths[:4])}.", fix=fix)
    try:
        return document.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_fault(fault["loc"], fault["msg"], fault["input"]) for fault in error.errors()[:4])
        raise UserError(f"The recipe is not valid: {faults}.", fix=fix) from error


def _truths(document: type[BaseModel], values: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[str]:
    """Faults of settings that are true or false, or hold one of them, and are something else by their type."""
    for name, field in document.model_fields.items():
        value, kinds = values.get(name), set(_kinds(field.annotation))
        parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if isinstance(value, Mapping):
            for part in parts:
                yield from _truths(part, value, (*place, name))
        elif bool not in kinds and any(type(item) is bool for item in (value if isinstance(value, list) else [value])):
            yield _fault((*place, name), "Input should be no truth value", value)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    if not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _fault(place: tuple[int | str, ...], message: str, given: object) -> str:
    """One fault in words; a fault without a place is about several values together, and is a sentence of ours."""
    if not place:
        return message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, place))}: {message} (got {given!r})"
