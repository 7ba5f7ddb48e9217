"""Bounds and values that may be chosen by name. Importing this is quick: the recipe reads it before torch is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from upvits.calib_data.errors import UserError

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MODELS: tuple[Literal["dense", "pruned"], ...] = ("dense", "pruned")
"""The two networks of a run."""

MAX_STREAMS = 256
"""So many sessions at once can be measured at most."""

MAX_THREADS = 1024
"""A session can have so many threads at most."""


def whole_number(text: str) -> int | None:
    """The number that one to nine digits say; None where it is anything else.

    >>> whole_number("32"), whole_number("-1"), whole_number("\N{SUPERSCRIPT TWO}")
    (32, None, None)
    """
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """Batch sizes that an engine accepts (`min` to `max`) and the one that it is tuned for (`opt`)."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UserError(
                f"batch profile {self.text} is not in order",
                why="An engine needs 1 <= smallest <= tuned-for <= largest batch.",
                fix="Give it as min:opt:max, for example 1:8:32.",
            )

    @property
    def text(self) -> str:
        """As it is written in a recipe, `1:8:32`."""
        return f"{self.min}:{self.opt}:{self.max}"


def parse_batch_profile(text: str) -> BatchProfile:
    """The profile that `min:opt:max` says.

    Raises:
        UserError: it is no such text, or not in order.

    >>> parse_batch_profile("1:8:32").opt
    8
    """
    sizes = [number for part in text.split(":") if (number := whole_number(part)) is not None]
    if len(sizes) != 3 or text.count(":") != 2:
        raise UserError(f"Batch profile {text!r} is not valid.", fix="Give it as min:opt:max, e.g. 1:8:32.")
    return BatchProfile(*sizes)
