"""Equal shares of every dimension, equal widths in all blocks of a stage: what stock timm can build."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import Component
from upvits.toolchain.planning.request import groups_to_cut
from upvits.toolchain.structure.groups import ChannelGroup, Kind, Widths, partition

Dimension = tuple[int, Kind]
"""Stage and kind of groups that get equal shares."""


def uniform_widths(groups: Sequence[ChannelGroup], ratio: float, align: int, components: Sequence[Component]) -> Widths:
    """Widths after removing `ratio` of every dimension, equal within a stage."""
    return widths_at(groups, dict.fromkeys(dimensions(groups, components), ratio), align, components)


def dimensions(groups: Sequence[ChannelGroup], components: Sequence[Component]) -> dict[Dimension, ChannelGroup]:
    """What has a share of its own, with the largest group of each; not embeddings that are as wide as their heads."""
    result: dict[Dimension, ChannelGroup] = {}
    cutting = groups_to_cut(groups, components)
    for group in cutting:
        key = group.stage, group.kind
        follows = group.kind == "embed" and _follows_heads(group, groups, cutting)
        if not follows and (key not in result or group.size > result[key].size):
            result[key] = group
    return result


def widths_at(
    groups: Sequence[ChannelGroup],
    ratios: Mapping[Dimension, float],
    align: int,
    components: Sequence[Component],
) -> Widths:
    """Widths after removing a share of every dimension.

    Args:
        groups: of the network.
        ratios: share to remove, by dimension.
        align: widths (dims per head) are multiples of this, or whole.
        components: what may be cut.

    Raises:
        UserError: a width would be zero.
    """
    channels, num_heads = {}, {}
    cutting = groups_to_cut(groups, components)
    for group in cutting:
        if (group.stage, group.kind) not in ratios:
            continue
        ratio = ratios[group.stage, group.kind]
        if group.kind == "heads":
            heads = max(1, int(group.size * (1 - ratio) + 0.5))
            head_dim = next(other.head_dim for other in groups if other.name == group.module)
            channels[group.module], num_heads[group.module] = heads * head_dim, heads
        elif group.kind in ("attention", "qk", "v"):
            head_dim = aligned(group.head_dim, ratio, align, group.name)
            channels[group.name], num_heads[group.module] = head_dim * group.num_heads, group.num_heads
        else:
            channels[group.name] = aligned(group.size, ratio, align, group.name)
    for group in cutting:
        if group.kind == "embed" and group.name not in channels:
            # heads that fill the embedding keep filling it: that is what stock timm can build
            names = [
                n for a in groups if a.stage == group.stage and a.kind == "qk" for n in (a.module, f"{a.module}.v")
            ]
            channels[group.name] = next(channels[name] for name in names if name in channels)
    return Widths(channels, num_heads)


def ratios_of(
    groups: Sequence[ChannelGroup], widths: Widths, components: Sequence[Component]
) -> dict[Dimension, float]:
    """The shares that `widths` removes of every dimension: what `widths_at` makes them from again."""
    left = {**widths.channels, **{f"{module}.heads": heads for module, heads in widths.num_heads.items()}}
    return {
        key: 1 - left.get(group.name, left.get(group.module, group.size)) / group.size  # q·k and v may be named as one
        for key, group in dimensions(groups, components).items()
    }


def _follows_heads(embed: ChannelGroup, groups: Sequence[ChannelGroup], cutting: Sequence[ChannelGroup]) -> bool:
    """Whether all heads of the stage fill its width, and are cut."""
    attention = [group for group in partition(groups) if group.kind in ("attention", "qk", "v")]
    of_stage = [group for group in attention if group.stage == embed.stage]
    pruned = any(group.kind in ("attention", "heads", "qk") for group in cutting)
    return pruned and bool(of_stage) and all(group.size == embed.size for group in of_stage)


def aligned(size: int, ratio: float, align: int, name: str) -> int:
    """`size` less the share `ratio`, rounded to a multiple of `align` (and never above `size`).

    Raises:
        UserError: nothing would be left.
    """
    width = size if ratio == 0 else min(size, int(size * (1 - ratio) / align + 0.5) * align)
    if width > 0:
        return width
    largest = 1 - 0.5 * align / size
    raise UserError(
        f"ratio {ratio:g} with alignment {align} would leave {name} (size {size}) without any channels.",
        why="A width of zero is no network.",
        fix=f"Use a ratio of at most {math.floor(largest * 100) / 100:g}, or a smaller `align=`."
        if largest > 0
        else f"Use `align={size // 2 or 1}` or less.",
    )
