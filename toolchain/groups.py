"""What can be pruned: groups of coupled channels, the tensor slices they own, and the masks that switch them off.

Everything here is plain description. A family adapter says which groups a model has; scoring, planning and surgery
read these descriptions and know no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["embed", "attention", "heads", "ffn"]


@dataclass(frozen=True, slots=True)
class Slice:
    """One axis of one parameter that a group's units index.

    The axis has length `repeat * group.size * unit`: `repeat` is 3 for the fused qkv (q, k and v stand one after
    another), `unit` is `head_dim` where one unit of the group is a whole head.
    """

    parameter: str
    axis: int
    repeat: int = 1
    unit: int = 1


@dataclass(frozen=True, slots=True)
class MaskPoint:
    """Where a unit of the group is switched off in the dense network.

    - `input` / `output`: the channels (last axis) that enter or leave `module` are multiplied by the mask;
      `pattern` tells which of the repeated parts are: (1, 0, 1) masks q and v of a fused qkv. q and k are never both
      masked, since one of them already removes the product and the gradient would be counted twice.
    - `norm`: `module` is a LayerNorm over the group's channels; it takes its mean and variance over the channels that
      are left, as the pruned network will.
    """

    module: str
    site: Literal["input", "output", "norm"]
    pattern: tuple[int, ...] = (1,)
    unit: int = 1


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Units that leave the network together.

    Attributes:
        name: the module that the group is named after, e.g. `blocks.3.mlp`.
        kind: `embed` (embedding or stage width), `attention` (head dims, q, k and v together), `heads` (the same
            tensors by whole heads) or `ffn` (hidden units).
        size: number of units.
        slices: every parameter axis that the units own.
        masks: where a unit is switched off for scoring.
        stage: groups of one stage get equal widths in a uniform plan.
        num_heads: for attention and heads groups, the heads that the units are spread over, in order.
        queries: parameters whose first rows produce q; they absorb the change of softmax scale when head_dim shrinks.
    """

    name: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    masks: tuple[MaskPoint, ...]
    stage: int = 0
    num_heads: int = 1
    queries: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Channels per head of an attention group."""
        return self.size // self.num_heads


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of all groups of a network: what its structure is, beyond timm's architecture name.

    Attributes:
        channels: group name -> number of units.
        num_heads: attention group name -> number of heads.
    """

    channels: dict[str, int] = field(default_factory=dict)
    num_heads: dict[str, int] = field(default_factory=dict)


def widths_of(groups: Sequence[ChannelGroup]) -> Widths:
    """The widths that a network with these groups has now."""
    own = [group for group in groups if group.kind != "heads"]
    return Widths(
        channels={group.name: group.size for group in own},
        num_heads={group.name: group.num_heads for group in own if group.kind == "attention"},
    )


def axis_indices(piece: Slice, size: int, keep: Tensor) -> Tensor:
    """Positions on the axis of `piece` that belong to the kept units.

    Args:
        piece: the slice.
        size: number of units of the group before the cut.
        keep: kept units, shape [k].

    Returns:
        Indices of shape [repeat * k * unit].
    """
    repeats = torch.arange(piece.repeat).view(-1, 1, 1) * (size * piece.unit)
    units = keep.view(1, -1, 1) * piece.unit
    return (repeats + units + torch.arange(piece.unit).view(1, 1, -1)).flatten()


def cut(state: Mapping[str, Tensor], groups: Sequence[ChannelGroup], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slice a state dict to the kept units of every group.

    Args:
        state: parameters of the dense network.
        groups: groups of the dense network.
        keep: group name -> kept units; groups that are not named stay whole.

    Returns:
        A new state dict; tensors that no group owns are shared with `state`.
    """
    result = dict(state)
    for group in groups:
        if group.name not in keep:
            continue
        for piece in group.slices:
            indices = axis_indices(piece, group.size, keep[group.name])
            tensor = result[piece.parameter]
            result[piece.parameter] = tensor.index_select(piece.axis, indices.to(tensor.device))
    return result


def narrowed_shapes(
    shapes: Mapping[str, torch.Size], groups: Sequence[ChannelGroup], widths: Widths
) -> dict[str, list[int]]:
    """Parameter shapes after the groups take new widths."""
    result = {name: list(shape) for name, shape in shapes.items()}
    for group in groups:
        if group.name not in widths.channels:
            continue
        for piece in group.slices:
            result[piece.parameter][piece.axis] = piece.repeat * widths.channels[group.name] * piece.unit
    return result
