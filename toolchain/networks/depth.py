"""Fewer blocks: which of them a shortened network keeps, and building it.

A block adds an attention branch and then an FFN branch to the residual stream. Taking out one attention branch and one
neighbouring FFN branch leaves a network of ordinary blocks: either a whole block goes, or a *shifted* one (UP-ViTs,
arXiv 2111.15127, section 3.2): the FFN of one block and the attention of the next.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from upvits.toolchain.families import family_of

T = TypeVar("T")
Blocks = Mapping[str, Sequence[tuple[int, int]]]
"""List of blocks -> for every block that is left, the dense blocks that its attention and its FFN come from."""


@dataclass(frozen=True, slots=True)
class DepthPath:
    """Greedy removal of blocks from one list, as far as it goes.

    Attributes:
        steps: what is left after the first, second, ... removal, as (attention, FFN) pairs.
        loss: joint KL to the dense network in nats at each step, all other lists whole.
    """

    steps: tuple[tuple[tuple[int, int], ...], ...]
    loss: tuple[float, ...]


_FFN_PARTS = ("norm2", "mlp", "ls2", "drop_path2")  # timm's names; what a block lacks is skipped


def all_blocks(model: nn.Module) -> dict[str, tuple[tuple[int, int], ...]]:
    """The blocks of a network as it is."""
    return {name: tuple((i, i) for i in range(count)) for name, count in family_of(model).block_lists(model).items()}


def last_blocks_first(model: nn.Module) -> dict[str, DepthPath]:
    """Paths on which the last block leaves each time: enough to see whether a request can be met before scoring."""
    result = {}
    for name, pairs in all_blocks(model).items():
        steps = tuple(pairs[:count] for count in range(len(pairs) - 1, 0, -1))
        result[name] = DepthPath(steps, tuple(float(index) for index in range(1, len(steps) + 1)))
    return result


def shorter(pairs: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], ...]]:
    """Every way to take one attention branch and a neighbouring FFN branch out of a list of blocks.

    Args:
        pairs: (attention, FFN) of each block.

    Returns:
        n lists without one block, then n - 1 without one shifted block; none when only one block is left.
    """
    if len(pairs) < 2:
        return []
    whole = [(*pairs[:i], *pairs[i + 1 :]) for i in range(len(pairs))]
    shifted = [
        (*pairs[:i], (pairs[i][0], pairs[i + 1][1]), *pairs[i + 2 :]) for i in range(len(pairs) - 1)
    ]  # the FFN of block i and the attention of block i + 1 leave
    return [tuple(blocks) for blocks in whole + shifted]


def shorten(model: nn.Module, blocks: Blocks) -> nn.Module:
    """A copy of the network with fewer blocks: a stock timm network of that depth.

    Args:
        model: a network of a supported family; it is not changed.
        blocks: for the lists that get shorter.
    """
    result = copy.deepcopy(model)
    for name, pairs in blocks.items():
        old = result.get_submodule(name)
        modules = list(old.children())
        kept = []
        for attention, ffn in pairs:
            block = modules[attention]
            for part in _FFN_PARTS:
                if hasattr(block, part) and attention != ffn:
                    setattr(block, part, getattr(modules[ffn], part))
            kept.append(block)
        result.set_submodule(name, type(old)(*kept) if isinstance(old, nn.Sequential) else nn.ModuleList(kept))
    family_of(result).refresh(result)
    return result


def name_after(name: str, blocks: Blocks) -> str | None:
    """What a group of the dense network is called in the shortened one; None when it left.

    Args:
        name: of the group, e.g. `blocks.3.mlp`.
        blocks: of the shortened network.
    """
    for listed, pairs in blocks.items():
        if name.startswith(f"{listed}."):
            index, part = _place(name, listed)
            sources = [pair[_branch(part)] for pair in pairs]
            return f"{listed}.{sources.index(index)}.{part}" if index in sources else None
    return name


def name_before(name: str, blocks: Blocks) -> str:
    """What a group of the shortened network is called in the dense one."""
    for listed, pairs in blocks.items():
        if name.startswith(f"{listed}."):
            index, part = _place(name, listed)
            return f"{listed}.{pairs[index][_branch(part)]}.{part}"
    return name


def after_shortening(values: Mapping[str, T], blocks: Blocks) -> dict[str, T]:
    """What is known of the dense network's groups, by the names of the shortened network's."""
    renamed = ((name_after(name, blocks), value) for name, value in values.items())
    return {name: value for name, value in renamed if name is not None}


def _place(name: str, listed: str) -> tuple[int, str]:
    """Index of the block and the path within it."""
    index, _, part = name.removeprefix(f"{listed}.").partition(".")
    return int(index), part


def _branch(part: str) -> int:
    """Position in an (attention, FFN) pair."""
    return 0 if part.startswith("attn") else 1
