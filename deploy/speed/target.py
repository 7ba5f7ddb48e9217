"""What a latency target says."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from upvits.calib_data.errors import UserError


@dataclass(frozen=True, slots=True)
class Target:
    """A latency in milliseconds per call, or how many times faster than the dense network; one of the two.

    `spelling` is how it was asked for: recipes are written with it.
    """

    spelling: str
    ms: float | None = None
    speedup: float | None = None

    @property
    def text(self) -> str:
        """For reports: `2 ms` or `1.5x`."""
        return f"{self.ms:g} ms" if self.ms is not None else f"{self.speedup:g}x"

    def ms_of(self, dense_ms: float) -> float:
        """The latency that it means where the dense network takes `dense_ms`."""
        return self.ms if self.ms is not None else dense_ms / (self.speedup or 1)


def parse_target(text: str) -> Target:
    """A target such as `2.0ms`.

    Raises:
        UserError: it is no time.

    >>> parse_target("2.0ms").ms
    2.0
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*ms\s*", text)
    ms = float(match[1]) if match else math.nan
    if not ms > 0:
        raise UserError(
            f"The latency target {text!r} is not valid.", fix="Give milliseconds per call, e.g. --target-latency 2.0ms."
        )
    return Target(text, ms=ms)


def parse_speedup(text: str) -> Target:
    """A target such as `2x`.

    Raises:
        UserError: it is no factor above 1.

    >>> parse_speedup("1.5x").speedup
    1.5
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x?\s*", text)
    factor = float(match[1]) if match else math.nan
    if not factor > 1:
        raise UserError(
            f"The speed-up {text!r} is not valid.",
            why="It says how many times faster than the dense network the pruned one is to be.",
            fix="Give a factor above 1, e.g. --speedup 2x.",
        )
    return Target(text, speedup=factor)
