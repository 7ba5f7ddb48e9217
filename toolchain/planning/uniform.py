"""Equal shares of every dimension, equal widths in all blocks of a stage: what stock timm can build."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import Component
from upvits.toolchain.planning.document import Size
from upvits.toolchain.planning.request import groups_to_cut
from upvits.toolchain.structure.groups import ChannelGroup, Widths, partition


def uniform_widths(groups: Sequence[ChannelGroup], ratio: float, align: int, components: Sequence[Component]) -> Widths:
    """Widths after removing `ratio` of every dimension, equal within a stage."""
    channels, num_heads = {}, {}
    cutting = groups_to_cut(groups, components)
    for group in cutting:
        if group.kind == "embed" and _follows_heads(group, groups, cutting):
            continue
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


def search_ratio(
    groups: Sequence[ChannelGroup],
    size: Callable[[Widths], Size],
    align: int,
    components: Sequence[Component],
    before: Size,
    target_macs: float | None,
    target_params: float | None,
) -> float:
    """The smallest ratio (to 1/256) whose network is at or below the target share of `before`.

    Sizes fall monotonically with the ratio, so bisection finds it.
    """

    def share(ratio: float) -> float:
        after = size(uniform_widths(groups, ratio, align, components))
        return after.macs / before.macs if target_macs is not None else after.params / before.params

    target = target_macs if target_macs is not None else target_params
    assert target is not None
    low, high = 0, _largest_ratio(groups, align, components)
    if share(high / 256) > target:
        raise UserError(
            f"{'target_macs' if target_macs is not None else 'target_params'} {target:g} cannot be reached.",
            why=f"Even the largest cut with alignment {align} keeps {share(high / 256):.3f}; "
            "what is left are the input layer, the head and the parts that are not pruned.",
            fix="Ask for a larger share, use a smaller `align=`, or prune more components.",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle / 256) <= target else (middle + 1, high)
    return low / 256


def _largest_ratio(groups: Sequence[ChannelGroup], align: int, components: Sequence[Component]) -> int:
    for step in range(255, -1, -1):
        try:
            uniform_widths(groups, step / 256, align, components)
        except UserError:
            continue
        return step
    raise UserError(f"align {align} is larger than a width of this network.", fix="Use a smaller `align=`.")
