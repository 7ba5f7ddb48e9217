"""What planners pay with: multiply-accumulates, or milliseconds from a table that was measured on the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Costs(Protocol):
    """A network's cost as a sum: one fixed part, and one part for each branch of each block."""

    @property
    def unit(self) -> str:
        """`MACs`, `parameters` or `ms`."""

    def fixed(self, dims: Mapping[str, int]) -> float:
        """Embeddings, norms and head, given the width of every `embed` group."""

    def branch(self, group: str, dim: int, width: tuple[int, int]) -> float:
        """One branch with its norm and its addition to the stream.

        Args:
            group: an attention group (`blocks.3.attn`) or an FFN group (`blocks.3.mlp`).
            dim: width of the stream that it reads and writes.
            width: for attention (dims of q, dims of v) over all heads; for an FFN (hidden units, 0).
        """
