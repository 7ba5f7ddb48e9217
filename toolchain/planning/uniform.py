"""Equal shares of every dimension, equal widths in all blocks of a stage: what stock timm can build."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from calib_data.errors import UserError
from toolchain.groups import ChannelGroup, Widths, widths_of
from toolchain.planning.document import Component, Size


def uniform_widths(groups: Sequence[ChannelGroup], ratio: float, align: int, components: Sequence[Component]) -> Widths:
    """Widths after removing `ratio` of every dimension, equal within a stage."""
    channels, num_heads = {}, {}
    for group in groups:
        if group.kind not in components or (group.kind == "embed" and _follows_heads(group, groups, components)):
            continue
        if group.kind == "heads":
            target, heads = _attention_of(group, groups), max(1, int(group.size * (1 - ratio) + 0.5))
            channels[target.name], num_heads[target.name] = heads * target.head_dim, heads
        elif group.kind == "attention":
            head_dim = aligned(group.head_dim, ratio, align, group.name)
            channels[group.name], num_heads[group.name] = head_dim * group.num_heads, group.num_heads
        else:
            channels[group.name] = aligned(group.size, ratio, align, group.name)
    for group in groups:
        if group.kind == "embed" and "embed" in components and group.name not in channels:
            # heads that fill the embedding keep filling it: that is what stock timm can build
            channels[group.name] = next(
                channels[a.name] for a in groups if a.kind == "attention" and a.stage == group.stage
            )
    return Widths(channels, num_heads)


def _follows_heads(group: ChannelGroup, groups: Sequence[ChannelGroup], components: Sequence[Component]) -> bool:
    attention = [other for other in groups if other.kind == "attention" and other.stage == group.stage]
    pruned = bool({"attention", "heads"} & set(components))
    return pruned and bool(attention) and all(other.size == group.size for other in attention)


def _attention_of(heads: ChannelGroup, groups: Sequence[ChannelGroup]) -> ChannelGroup:
    return next(group for group in groups if group.kind == "attention" and f"{group.name}.heads" == heads.name)


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
        fix=f"Use a ratio of at most {math.floor(largest * 100) / 100:g}, or a smaller --align."
        if largest > 0
        else f"Use --align {size // 2 or 1} or less.",
    )


def search_ratio(
    groups: Sequence[ChannelGroup],
    size: Callable[[Widths], Size],
    align: int,
    components: Sequence[Component],
    target_macs: float | None,
    target_params: float | None,
) -> float:
    """The smallest ratio (to 1/256) whose network is at or below the target.

    Sizes fall monotonically with the ratio, so bisection finds it.
    """
    before = size(widths_of(groups))

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
            fix="Ask for a larger share, use a smaller --align, or prune more components.",
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
    raise UserError(f"align {align} is larger than a width of this network.", fix="Use a smaller --align.")
