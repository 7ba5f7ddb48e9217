"""Bounds and values that may be chosen by name. Importing this is quick: the recipe reads it before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from upvits.calib_data.errors import UserError

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MAX_STREAMS = 256
"""So many sessions at once can be measured at most."""


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
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise UserError(f"Batch profile {text!r} is not valid.", fix="Give it as min:opt:max, e.g. 1:8:32.")
    smallest, tuned_for, largest = map(int, parts)
    return BatchProfile(smallest, tuned_for, largest)
