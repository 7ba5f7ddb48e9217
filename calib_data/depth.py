"""Pictures of more than 8 bits: how bright their values are. Files do not say it: 12 bits lie in 16, and dark pictures
use few of their values. So one range is found for a whole set of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_WHOLE, _REAL = (255, 4095, 65535), (1, 255, 4095, 65535)
_BITS = {1: "0 to 1", 255: "8 bits", 4095: "12 bits", 65535: "16 bits"}


@dataclass(frozen=True, slots=True)
class Depth:
    """The value that is white, of pictures with whole and with real numbers; 0: there are none.

    Example:
        >>> deepest([Depth(whole=4095), Depth(), Depth(whole=65535)])
        Depth(whole=65535, real=0)
    """

    whole: int = 0
    real: int = 0


def deepest(depths: Iterable[Depth]) -> Depth:
    """The range that fits all of them."""
    found = list(depths)
    return Depth(max((one.whole for one in found), default=0), max((one.real for one in found), default=0))


def depth_fitting(low: float, high: float, *, real: bool) -> Depth:
    """The smallest of the usual ranges that values fit into.

    Raises:
        ValueError: they fit into none.
    """
    top = next((top for top in (_REAL if real else _WHOLE) if low >= 0 and high <= top), None)
    if top is None:
        raise ValueError(f"values from {low} to {high}")
    return Depth(real=top) if real else Depth(whole=top)


def depth_notes(depth: Depth, checked: int) -> tuple[str, ...]:
    """What is said about the range of a set, of which so many pictures were looked at; nothing for 8 bits."""
    tops = [top for top in (depth.whole, depth.real) if top]
    return tuple(
        f"Pictures of more than 8 bits are scaled from 0..{top} ({_BITS[top]}), the smallest usual range that fits all "
        f"of the {checked:,} pictures that were checked."
        for top in tops
    )
