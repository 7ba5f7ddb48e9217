"""Which units stay, once the widths are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import ChannelGroup, Widths


def kept_units(group: ChannelGroup, scores: Scores, widths: Widths, whole_heads: bool) -> Tensor:
    """Ascending indices of the kept units of one group."""
    values = scores.values[group.name]
    if group.kind not in ("attention", "qk", "v"):
        return _top(values, widths.channels[group.name])
    heads = widths.num_heads[group.module]
    if whole_heads and widths.channels[group.name] == heads * group.head_dim:
        best = _top(scores.values[f"{group.name}.heads"], heads)
        return (best.view(-1, 1) * group.head_dim + torch.arange(group.head_dim)).flatten()
    # equally many dims from every head, or from every run of consecutive heads that is merged into one
    per_head = widths.channels[group.name] // heads
    pools = values.view(heads, -1)
    return torch.cat([_top(pool, per_head) + index * pools.shape[1] for index, pool in enumerate(pools)])


def _top(values: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest values; ties keep the earlier unit."""
    return values.sort(descending=True, stable=True).indices[:count].sort().values


def kept_by_scores(
    groups: Sequence[ChannelGroup], scores: Scores, widths: Widths, whole_heads: bool
) -> dict[str, tuple[int, ...]]:
    """Kept units of every group that `widths` names."""
    return {
        group.name: tuple(kept_units(group, scores, widths, whole_heads).tolist())
        for group in groups
        if group.name in widths.channels
    }
