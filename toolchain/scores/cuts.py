"""Where a plan will cut: among which units it chooses, and how many of them stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from upvits.toolchain.structure.groups import ChannelGroup, Widths


@dataclass(frozen=True, slots=True)
class Cut:
    """The units of a group fall into `pools` equal runs of consecutive units; the best `keep` of each run stay."""

    pools: int
    keep: int

    def kept(self, values: Tensor) -> Tensor:
        """Whether each unit stays, [size] bool, by scores [size]; ties keep the earlier unit."""
        order = values.view(self.pools, -1).sort(dim=1, descending=True, stable=True).indices
        mask = values.new_zeros(order.shape).bool().scatter_(1, order[:, : self.keep], True)
        return mask.flatten()


def cut_of(group: ChannelGroup, widths: Widths | None) -> Cut:
    """The cut of a group in a plan with these widths; half of the units where the plan leaves the group whole.

    Attention dims are chosen head by head, or from each run of heads that the plan merges into one.
    """
    widths = widths or Widths()
    heads = widths.num_heads.get(_attention_of(group), group.num_heads)
    if group.kind == "heads":
        return Cut(1, heads if 0 < heads < group.size else max(1, group.size // 2))
    kept = widths.channels.get(group.name, group.size)
    if group.num_heads % heads:  # whole heads leave: none are merged, and their dims are not asked for
        heads, kept = group.num_heads, group.size
    pools = heads if group.kind not in ("embed", "ffn") else 1
    kept //= pools
    size = group.size // pools
    return Cut(pools, kept if 0 < kept < size else max(1, size // 2))


def _attention_of(group: ChannelGroup) -> str:
    return group.name.removesuffix(".heads").removesuffix(".qk").removesuffix(".v")
