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

from upvits.calib_data.documents import Name, Natural

Kind = Literal["embed", "attention", "heads", "qk", "v", "ffn"]


@dataclass(frozen=True, slots=True)
class Slice:
    """One axis of one parameter that a group's units index.

    The group's part of the axis begins at `start` and has length `repeat * group.size * unit`: `repeat` is 3 for the
    fused qkv (q, k and v stand one after another), `unit` is `head_dim` where one unit of the group is a whole head.
    What lies before and after belongs to other groups.
    """

    parameter: str
    axis: int
    repeat: int = 1
    unit: int = 1
    start: int = 0


@dataclass(frozen=True, slots=True)
class MaskPoint:
    """Where a unit of the group is switched off in the dense network.

    - `input` / `output`: the channels (last axis) that enter or leave `module` are multiplied by the mask, from
      channel `start` on; `pattern` tells which of the repeated parts are: (1, 0, 1) masks q and v of a fused qkv. q and
      k are never both masked, since one of them already removes the product and the gradient would be counted twice.
      Channels that no part covers are left alone.
    - `norm`: `module` is a LayerNorm over the group's channels; it takes its mean and variance over the channels that
      are left, as the pruned network will.
    """

    module: str
    site: Literal["input", "output", "norm"]
    pattern: tuple[int, ...] = (1,)
    unit: int = 1
    start: int = 0


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Units that leave the network together.

    Attributes:
        name: the module that the group is named after, e.g. `blocks.3.mlp`.
        kind: `embed` (embedding or stage width), `attention` (head dims, q, k and v together), `heads` (the same
            tensors by whole heads), `qk` and `v` (the same tensors again: q and k dims together, v dims on their own)
            or `ffn` (hidden units). A network in which q·k and v dims differ has no `attention` and `heads` groups.
        size: number of units.
        slices: every parameter axis that the units own.
        masks: where a unit is switched off for scoring.
        stage: groups of one stage get equal widths in a uniform plan.
        num_heads: for attention, heads, qk and v groups, the heads that the units are spread over, in order.
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
        """Channels per head of an attention, qk or v group."""
        return self.size // self.num_heads

    @property
    def module(self) -> str:
        """The module that the group belongs to: `blocks.3.attn` for `blocks.3.attn.qk`."""
        return self.name.rpartition(".")[0] if self.kind in ("heads", "qk", "v") else self.name


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of all groups of a network: what its structure is, beyond timm's architecture name.

    Attributes:
        channels: group name -> number of units. An attention has either its own name (q·k and v dims are equal) or
            two, with `.qk` and `.v`.
        num_heads: attention module (`blocks.3.attn`) -> number of heads.
    """

    channels: dict[Name, Natural] = field(default_factory=dict)
    num_heads: dict[Name, Natural] = field(default_factory=dict)

    @property
    def head_dims(self) -> dict[str, int]:
        """Channels per head, by the names that the attentions have in `channels`."""
        head_dims = {}
        for module, heads in self.num_heads.items():
            for name in (module, f"{module}.qk", f"{module}.v"):
                if name in self.channels:
                    head_dims[name] = self.channels[name] // heads
        return head_dims


def partition(groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """The groups that together make up the network, each tensor once: `qk` and `v` only where they differ in size."""
    coupled = {group.name for group in groups if group.kind == "attention"}
    return tuple(
        group
        for group in groups
        if group.kind != "heads" and not (group.kind in ("qk", "v") and group.module in coupled)
    )


def widths_of(groups: Sequence[ChannelGroup]) -> Widths:
    """The widths that a network with these groups has now."""
    whole = partition(groups)
    return Widths(
        channels={group.name: group.size for group in whole},
        num_heads={group.module: group.num_heads for group in whole if group.kind in ("attention", "qk")},
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
    return piece.start + (repeats + units + torch.arange(piece.unit).view(1, 1, -1)).flatten()


def cut(state: Mapping[str, Tensor], groups: Sequence[ChannelGroup], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slice a state dict to the kept units of every group.

    Args:
        state: parameters of the dense network.
        groups: groups of the dense network.
        keep: group name -> kept units in ascending order; groups that are not named stay whole. An attention's
            coupled group and its `qk` and `v` are not named together.

    Returns:
        A new state dict; tensors that no group owns are shared with `state`.
    """
    left: dict[tuple[str, int], Tensor] = {}  # groups may own parts of the same axis, so all are marked before any cut
    for group in groups:
        if group.name not in keep:
            continue
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[keep[group.name]] = False
        for piece in group.slices:
            length = state[piece.parameter].shape[piece.axis]
            mask = left.setdefault((piece.parameter, piece.axis), torch.ones(length, dtype=torch.bool))
            mask[axis_indices(piece, group.size, gone.nonzero().flatten())] = False
    result = dict(state)
    for (name, axis), mask in left.items():
        result[name] = result[name].index_select(axis, mask.nonzero().flatten().to(result[name].device))
    return result


def narrowed_shapes(
    shapes: Mapping[str, torch.Size], groups: Sequence[ChannelGroup], widths: Widths
) -> dict[str, list[int]]:
    """Parameter shapes after the groups take new widths."""
    result = {name: list(shape) for name, shape in shapes.items()}
    for group in groups:
        if group.name not in widths.channels:
            continue
        fewer = group.size - widths.channels[group.name]
        for piece in group.slices:
            result[piece.parameter][piece.axis] -= piece.repeat * fewer * piece.unit
    return result
