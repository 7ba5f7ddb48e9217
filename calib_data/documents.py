"""Documents that people pass or that travel with a run: read as data, checked against a schema, and refused in one
message.

Every JSON document is read here (`tests/test_architecture.py`), and a recipe in TOML is held to the same bounds. What
is refused before a schema sees it: no regular file, too many bytes, no UTF-8, too deep, more values than any document
of this tool has (a schema that collects faults would fill memory with them), whole numbers beyond 64 bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import psutil
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular, unusable
from upvits.calib_data.printable import printable

Document = TypeVar("Document")

Natural = Annotated[int, Field(ge=1, le=2**53)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=1e-12, le=1e15, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1_000)]
Text = Annotated[str, Field(max_length=100_000)]
Scalar = bool | Annotated[int, Field(ge=-(2**53), le=2**53)] | Number | Text | None
Facts = dict[Name, Scalar | list[Scalar] | Mapping[Name, Scalar | list[Scalar] | Mapping[Name, Scalar | list[Scalar]]]]
"""What a library, a machine or a setting says of itself: names and values, three levels at most."""

_LARGEST = 16 << 20
"""Bytes. The largest document of a run or a model, with the names of 100,000 classes, has half of it."""

_VALUES, _OF_OBJECT = 500_000, 20
"""Values of a document, an object counted as that many: each may miss that many entries, and each that is missed is a
fault of half a kilobyte."""

_FAULTS = 1_000

_MEMORY = {",": 50, "[": 160, "{": 160, '"': 30}
"""Bytes that what stands behind such a sign takes in memory, about, beside three for every byte of text."""
_AT_MOST, _ALWAYS = 24, 64 << 20
"""Bytes of memory for each byte of a large document; real ones take about 10, brackets without anything in them 75."""
_VERSION = ("format_version", "format")


def read_document(
    path: Path, kind: type[Document], *, fix: str, strict: bool = True, largest: int = _LARGEST, plain: bool = True
) -> Document:
    """The document in a JSON file.

    Args:
        path: of the file.
        kind: schema that it has to fit, of pydantic or a dataclass; entries have bounds and no NaN.
        fix: what to do when the file is no such document.
        strict: values are not converted (a number in quotes is no number).
        largest: bytes that such a document has at most.
        plain: whether it is held to `require_plain`; False only for large ones, with a schema that stops at the first
            fault of every list (`FailFast`) and has no entries by free names. Those are held to `require_memory`.

    Raises:
        UserError: names the file, the entry that is wrong, and `fix`.
    """
    text = read_regular(path, fix=fix, largest=largest)
    return parse_document(text, str(path), kind, fix=fix, strict=strict, plain=plain)


def parse_document(
    text: bytes | str, name: str, kind: type[Document], *, fix: str, strict: bool = True, plain: bool = True
) -> Document:
    """The document in JSON text that was read from `name`; raises like `read_document`."""
    try:
        if plain:  # and without keys that stand there twice
            text = to_json(parse_json(text, name, fix=fix), inf_nan_mode="constants")
        else:
            require_memory(text, name, fix=fix)
        document: Document = _adapter(cast(Hashable, kind)).validate_json(text, strict=strict)
        return document
    except ValidationError as error:
        raise _refused(name, error, fix) from error


def parse_json(text: bytes | str, name: str, *, fix: str) -> Any:
    """Plain values in JSON text that was read from `name`, for what has no schema of ours.

    Raises:
        UserError: it is no JSON, or `require_plain` refuses it.
    """
    try:
        values = from_json(text)
        require_plain(values)
    except ValueError as error:
        raise UserError(f"{name} is not valid.", why=f"{printable(str(error), 300)}.", fix=fix) from error
    return values


def require_plain(values: Any) -> None:
    """Refuse values of JSON or TOML that no document of this tool has.

    Raises:
        ValueError: there are too many, or a whole number has more than 64 bits.
    """
    counted, waiting = 0, [[values]]
    while waiting:
        inside = waiting.pop()
        counted += len(inside)
        if counted > _VALUES:
            raise ValueError(f"it has more than {_VALUES:,} values")
        for value in inside:
            if isinstance(value, dict):
                counted += _OF_OBJECT
                waiting.append(list(value.values()))
            elif isinstance(value, list):
                waiting.append(value)
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError("a whole number in it has more than 64 bits")


def require_memory(text: bytes | str, name: str, *, fix: str, rows: bool = False) -> None:
    """Refuse a large document that would take more memory than is free, told from the signs in it before it is parsed.

    Args:
        text: of a file that was read from `name`.
        fix: what to do then.
        rows: lines are rows, which take memory of their own.

    Raises:
        UserError: it would, or it is made of brackets and commas more than of anything else.
    """
    signs = {**_MEMORY, "\n": 160} if rows else _MEMORY
    counted = (text.count(sign) if isinstance(text, str) else text.count(sign.encode()) for sign in signs)
    needed = 3 * len(text) + sum(count * each for count, each in zip(counted, signs.values(), strict=True))
    free = psutil.virtual_memory().available
    if needed > _AT_MOST * len(text) + _ALWAYS:
        raise UserError(f"{name} is not valid.", why="It has far more brackets and commas than anything else.", fix=fix)
    if needed > max(free, _ALWAYS):
        raise UserError(
            f"{name} is too large for this machine.",
            why=f"It would take about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free.",
            fix="Close other programs, use a machine with more memory, or give a part of it.",
        )


def _refused(name: str, error: ValidationError, fix: str) -> UserError:
    if error.error_count() > _FAULTS:  # naming one would list them all
        return UserError(f"{name} is not valid.", why=f"{error.error_count():,} entries of it are wrong.", fix=fix)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the document"
    if _is_of_another_version(first):
        return UserError(
            f"{name} was written by another version of this tool.", why=f"Its {where} is {first['input']}.", fix=fix
        )
    return UserError(f"{name} is not valid.", why=f"{printable(where, 300)}: {printable(first['msg'], 300)}.", fix=fix)


def _is_of_another_version(fault: ErrorDetails) -> bool:
    return fault["loc"][-1:] in [(name,) for name in _VERSION] and type(fault["input"]) is int


@lru_cache(maxsize=256)
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))


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
