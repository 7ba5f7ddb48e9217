"""A forward pass as a chain of functions, so that a part of it can be run again from what was kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """One link of the chain; running all of them in turn is `model.forward`.

    Attributes:
        name: of the module that it runs (`blocks.3`), or `embed` and `head`.
        kind: `embed` makes the residual stream (of the network or of a stage), `block` changes it, `head` reads it.
        run: images or stream -> stream or output.
    """

    name: str
    kind: Literal["embed", "block", "head"]
    run: Callable[[Tensor], Tensor]
