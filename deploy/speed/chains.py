"""Small networks for timing: one branch of a block several times in a row, and the network without its blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from upvits.deploy.speed.deployment import with_random_weights
from upvits.toolchain.families import family_of, groups_of, narrow, segments_of, skeleton
from upvits.toolchain.networks.depth import shorten
from upvits.toolchain.planning.uniform import aligned
from upvits.toolchain.structure.groups import Widths

Part = Literal["attn", "mlp"]
_MODULES: dict[Part, tuple[str, str, str]] = {"attn": ("norm1", "attn", "ls1"), "mlp": ("norm2", "mlp", "ls2")}


@dataclass(frozen=True, slots=True)
class Stage:
    """A list of like blocks, and what flows through it.

    Attributes:
        blocks: name of the list, `blocks` or `stages.N.blocks`.
        count: how many there are.
        embed: group whose width is that of the stream.
        dim: that width.
        size: stream between the blocks, (height, width, channels); a ViT's tokens count as one row.
        on_map: whether the blocks are told height and width.
        heads: of an attention branch.
        widths: units of an attention and of an FFN branch.
    """

    blocks: str
    count: int
    embed: str
    dim: int
    size: tuple[int, int, int]
    on_map: bool
    heads: int
    widths: Mapping[Part, int]


def stages_of(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[Stage, ...]:
    """The lists of blocks of a network with the sizes of their streams."""
    sizes: dict[str, tuple[int, ...]] = {}
    device = next(model.parameters()).device
    with torch.inference_mode():
        stream = torch.zeros(1, *input_size, device=device)
        for segment in segments_of(model):
            sizes.setdefault(segment.name, tuple(stream.shape[1:]))
            stream = segment.run(stream)
    groups = {group.name: group for group in groups_of(model)}
    embeds = {group.stage: group.name for group in groups.values() if group.kind == "embed"}
    stages = []
    for blocks in dict.fromkeys(name.rpartition(".")[0] for name in sizes if f"{name}.mlp" in groups):
        attention, ffn = groups[f"{blocks}.0.attn"], groups[f"{blocks}.0.mlp"]
        size = sizes[f"{blocks}.0"]
        stages.append(
            Stage(
                blocks=blocks,
                count=sum(name.rpartition(".")[0] == blocks for name in sizes),
                embed=embeds[ffn.stage],
                dim=size[-1],
                size=cast(tuple[int, int, int], size if len(size) == 3 else (1, *size)),
                on_map=len(size) == 3,
                heads=attention.num_heads,
                widths={"attn": attention.size, "mlp": ffn.size},
            )
        )
    return tuple(stages)


class Chain(nn.Module):
    """Blocks' attention branches, or their FFN branches, one after another on the stream [B, H, W, C]."""

    def __init__(self, blocks: Sequence[nn.Module], part: Part, on_map: bool) -> None:
        super().__init__()
        self.blocks, self.part, self.on_map = nn.ModuleList(blocks), part, on_map

    def forward(self, stream: Tensor) -> Tensor:
        """The stream after all branches, [B, H * W, C]."""
        size = list(stream.shape[1:3])
        tokens = stream.flatten(1, 2)
        norm, work, scale = _MODULES[self.part]
        for block in cast(list[Any], self.blocks):
            inner = getattr(block, norm)(tokens)
            inner = getattr(block, work)(inner, size) if self.on_map else getattr(block, work)(inner)
            tokens = tokens + (getattr(block, scale)(inner) if hasattr(block, scale) else inner)
        return tokens if len(self.blocks) else tokens + 1  # an empty graph is none


def chain(model: nn.Module, stage: Stage, part: Part, dim: int, width: int, repeats: int) -> nn.Module:
    """One branch so many times in a row, each with weights of its own; with 0 it is the cost of a call alone."""
    short = shorten(skeleton(model), {stage.blocks: ((0, 0),)})
    attention = width if part == "attn" else stage.widths["attn"]
    ffn = width if part == "mlp" else stage.widths["mlp"]
    names = {stage.embed: dim, f"{stage.blocks}.0.attn": attention, f"{stage.blocks}.0.mlp": ffn}
    narrowed = narrow(short, Widths(names, {f"{stage.blocks}.0.attn": stage.heads}))
    block = narrowed.get_submodule(f"{stage.blocks}.0")
    made = [with_random_weights(copy.deepcopy(block), seed) for seed in range(repeats)]
    return Chain(made, part, stage.on_map).eval()


def without_blocks(model: nn.Module, dims: Mapping[str, int]) -> nn.Module:
    """Embeddings, norms and head at these widths of the `embed` groups, on the meta device."""
    lists = family_of(model).block_lists(model)
    short = shorten(skeleton(model), dict.fromkeys(lists, ((0, 0),)))
    return shorten(narrow(short, Widths(dict(dims))), dict.fromkeys(lists, ()))


def grid(size: int, shares: Sequence[float], align: int) -> tuple[int, ...]:
    """Aligned widths at these shares of a dimension, ascending; the whole of it is the last."""
    widths = {size}
    for share in shares:
        if size * share >= align / 2:
            widths.add(aligned(size, 1 - share, align, "a width"))
    return tuple(sorted(widths))
