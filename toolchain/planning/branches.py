"""The widths that attentions and FFNs may take, and what each of them loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import Component
from upvits.toolchain.planning.curves import Curve, curve_of
from upvits.toolchain.planning.request import groups_to_cut
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import ChannelGroup


@dataclass(frozen=True, slots=True)
class Option:
    """One width of a branch.

    Attributes:
        width: (dims of q, dims of v) over all heads, or (hidden units, 0), as `Costs.branch` takes it.
        loss: expected KL in nats.
        gone: how many units of each of the branch's groups leave.
        heads: number of heads; 0 for an FFN.
    """

    width: tuple[int, int]
    loss: float
    gone: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Branch:
    """An attention or an FFN of the dense network.

    Attributes:
        name: its module.
        stream: the embed group that it reads and writes.
        groups: what is cut of it: nothing, one group, or `qk` and `v`.
        options: its possible widths.
    """

    name: str
    stream: str
    groups: tuple[ChannelGroup, ...]
    options: tuple[Option, ...]


def branches_of(
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, Curve],
    components: Sequence[Component],
    align: int,
    floors: Mapping[str, int],
) -> tuple[Branch, ...]:
    """All branches of a network with the widths that they may take.

    Args:
        groups: of the dense network.
        curves: of every group that may be cut.
        components: what may be cut.
        align: widths (dims per head) are multiples of this, or whole.
        floors: least units of every group.
    """
    cutting = groups_to_cut(groups, components)
    stream = {group.stage: group.name for group in groups if group.kind == "embed"}
    size = {group.name: group.size for group in groups}
    result = []
    for group in groups:
        if group.kind not in ("qk", "ffn"):
            continue
        groups_cut = tuple(cut for cut in cutting if cut.module == group.module and cut.kind != "embed")
        whole = (group.size, 0) if group.kind == "ffn" else (group.size, size[f"{group.module}.v"])
        heads = 0 if group.kind == "ffn" else group.num_heads
        choices = product(*([(cut, n) for n in allowed_sizes(cut, align, floors[cut.name])] for cut in groups_cut))
        options = tuple(_option(whole, heads, choice, curves) for choice in choices)
        result.append(Branch(group.module, stream[group.stage], groups_cut, options))
    return tuple(result)


def floors_of(groups: Sequence[ChannelGroup], floor: float) -> dict[str, int]:
    """The least units of every group: the share `floor` of what it has, at least one."""
    return {group.name: max(1, math.ceil(group.size * floor)) for group in groups}


def allowed_sizes(group: ChannelGroup, align: int, least: int) -> list[int]:
    """Sizes that a group may take, rising: aligned (per head) and at least `least`, or whole."""
    if group.kind == "heads":
        return list(range(least, group.size + 1))
    heads = group.num_heads
    first = max(1, math.ceil(least / heads / align)) * align
    return [dims * heads for dims in range(first, group.head_dim, align)] + [group.size]


def _option(
    whole: tuple[int, int], heads: int, choice: tuple[tuple[ChannelGroup, int], ...], curves: Mapping[str, Curve]
) -> Option:
    width = list(whole)
    for group, size in choice:
        if group.kind == "heads":
            width, heads = [dims * size // group.size for dims in whole], size
        elif group.kind == "attention":
            width = [size, size]
        else:
            width[1 if group.kind == "v" else 0] = size
    gone = tuple(group.size - size for group, size in choice)
    loss = sum(float(curves[group.name].loss[count]) for (group, _), count in zip(choice, gone, strict=True))
    return Option((width[0], width[1]), loss, gone, heads)


def sizes_of(branch: Branch, option: Option) -> dict[str, int]:
    """What is left of the branch's groups; whole heads are given as all their dims, under the attention's name."""
    sizes = {}
    for group, gone in zip(branch.groups, option.gone, strict=True):
        if group.kind == "heads":
            sizes[group.module] = option.width[0]
        else:
            sizes[group.name] = group.size - gone
    return sizes


def curves_for(
    groups: Sequence[ChannelGroup],
    components: Sequence[Component],
    scores: Scores,
    given: Mapping[str, Curve] | None,
) -> dict[str, Curve]:
    """The curves of all groups that may be cut: those that were handed in, the others from the scores.

    Raises:
        UserError: there are no curves, and the scores have no unit, so that they can't be weighed against each other.
    """
    curves = dict(given or {})
    for group in groups_to_cut(groups, components):
        if group.name in curves:
            continue
        if scores.unit != "nats":
            raise UserError(
                f"The global planner cannot weigh {scores.method} scores of different groups against each other.",
                why="It needs to know how many nats of KL each unit costs.",
                fix="Score by fisher or kl, or use the uniform planner.",
            )
        spread = group.num_heads if group.kind in ("attention", "qk", "v") else 1
        curves[group.name] = curve_of(scores.values[group.name], spread)
    return curves
