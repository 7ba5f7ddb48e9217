"""Equal widths in all blocks of a stage that use a budget up.

One share for all dimensions cannot do it: a stage whose heads fill its embedding moves by (heads x align) channels at
once, a tenth of a network. So FFNs get a share of their own, as near to that of the others as the budget allows, and
what is then left goes to single stages.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import Component
from upvits.toolchain.planning.costs import Costs
from upvits.toolchain.planning.document import PruningPlan
from upvits.toolchain.planning.uniform import Dimension, dimensions, ratios_of, widths_at
from upvits.toolchain.structure.groups import ChannelGroup, Widths

TOLERANCE = 0.01
"""Share of a budget that a plan may leave unused without a word."""

_GRID = 256  # common shares that are tried

_LOGGER = logging.getLogger(__name__)

Ratios = dict[Dimension, float]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Widths within the budget.

    Attributes:
        skew: how far apart the shares are that leave the dimensions.
    """

    widths: Widths
    cost: float
    skew: float


def widths_within(
    groups: Sequence[ChannelGroup],
    costs: Costs,
    budget: float,
    align: int,
    components: Sequence[Component],
    asked: str,
) -> Widths:
    """Widths, equal within a stage, that use a budget up.

    Among those that leave at most `TOLERANCE` of it, the ones with the most equal shares of all dimensions; where there
    are none, those that leave least.

    Args:
        groups: of the network.
        costs: of its branches and of the rest.
        budget: in the unit of the costs.
        align: widths (dims per head) are multiples of this, or whole.
        components: what may be cut.
        asked: what the budget comes from, for the message.

    Raises:
        UserError: the budget is below what the largest cut leaves.
    """
    search = _Search(groups, costs, budget, align, components)
    candidates = list(search.candidates())
    used = [candidate for candidate in candidates if candidate.cost >= (1 - TOLERANCE) * budget]
    if not used:
        candidates += search.candidates(one_wider=True)
        used = [candidate for candidate in candidates if candidate.cost >= (1 - TOLERANCE) * budget]
    if not candidates:
        raise UserError(
            f"{asked} cannot be reached: it means {budget:,.6g} {costs.unit}.",
            why=f"The largest cut with alignment {align} keeps {search.least():,.6g}; what is left are the input "
            "layer, the head and the parts that are not pruned.",
            fix="Ask for a larger share, use a smaller `align=`, or prune more components.",
        )
    if used:
        return min(used, key=lambda candidate: (candidate.skew, -candidate.cost)).widths
    return max(candidates, key=lambda candidate: candidate.cost).widths


def cost_of(groups: Sequence[ChannelGroup], costs: Costs, widths: Widths) -> float:
    """The cost of a network at some widths; groups that are not named are whole."""
    sizes = {**{group.name: group.size for group in groups if group.kind != "heads"}, **widths.channels}
    stream = {group.stage: group.name for group in groups if group.kind == "embed"}
    total = costs.fixed({name: sizes[name] for name in stream.values()})
    for group in groups:
        if group.kind == "ffn":
            total += costs.branch(group.name, sizes[stream[group.stage]], (sizes[group.name], 0))
        elif group.kind == "qk":
            coupled = widths.channels.get(group.module)
            width = (sizes[group.name], sizes[f"{group.module}.v"]) if coupled is None else (coupled, coupled)
            total += costs.branch(group.module, sizes[stream[group.stage]], width)
    return total


def say_what_is_unused(groups: Sequence[ChannelGroup], plan: PruningPlan, name: str, target: float, align: int) -> None:
    """Warn of a plan that leaves more than `TOLERANCE` of its budget, and name the steps that were too large for it.

    Args:
        groups: of the network that the plan cuts widths of.
        plan: what was chosen.
        name: of what was asked for, `target_macs` or `target_params`.
        target: share of the dense network to keep.
        align: of the plan.
    """
    before, after = ((s.macs, s.params)[name == "target_params"] for s in (plan.before, plan.after))
    unused = 1 - after / (target * before)
    left = {**plan.widths.channels, **{f"{module}.heads": heads for module, heads in plan.widths.num_heads.items()}}
    steps = [
        f"{group.name} by {1 if group.kind == 'heads' else align * group.num_heads}"
        for group in dimensions(groups, plan.components).values()
        if left.get(group.name, left.get(group.module, group.size)) < group.size
    ]
    if unused > TOLERANCE and steps:
        _LOGGER.warning(
            "%s %g: %.1f %% of the budget stays unused, because no width can take another step of its alignment (%s). "
            "A smaller `align=` uses more of it.",
            name, target, 100 * unused, ", ".join(steps),
        )  # fmt: skip


class _Search:
    """What `ratios_within` tries."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        costs: Costs,
        budget: float,
        align: int,
        components: Sequence[Component],
    ) -> None:
        self.groups, self.costs, self.budget = groups, costs, budget
        self.align, self.components = align, components
        self.dimensions = dimensions(groups, components)
        self.largest_common = self._largest([key for key in self.dimensions if key[1] != "ffn"])
        self.largest_of_ffn = self._largest([key for key in self.dimensions if key[1] == "ffn"])

    def candidates(self, *, one_wider: bool = False) -> Iterator[_Candidate]:
        """For every common share, the share of the FFNs that fits, with what is left spent stage by stage.

        Args:
            one_wider: one dimension a step wider than the common share.
        """
        seen = set()
        for common in range(self.largest_common + 1):
            start = self._ratios(common, 0)
            if (shape := tuple(self._widths(start).channels.items())) in seen:
                continue
            seen.add(shape)
            wider = [key for key in start if one_wider and key[1] != "ffn" and start[key] > 0]
            for others in [{**start, key: self._one_step_less(key, start[key])} for key in wider] or [start]:
                fitting = self._fitting(others)
                if fitting is not None:
                    widths = self._widths(self._spend(fitting))
                    shares = ratios_of(self.groups, widths, self.components).values()
                    yield _Candidate(widths, cost_of(self.groups, self.costs, widths), max(shares) - min(shares))

    def least(self) -> float:
        """The cost of the largest cut."""
        return self._cost(self._ratios(self.largest_common, self.largest_of_ffn))

    def _ratios(self, common: int, of_ffn: int) -> Ratios:
        return {key: (of_ffn if key[1] == "ffn" else common) / _GRID for key in self.dimensions}

    def _fitting(self, others: Ratios) -> Ratios | None:
        """With the smallest share of the FFNs whose network is within the budget, by bisection: costs fall with it."""

        def with_ffn(share: int) -> Ratios:
            return {key: share / _GRID if key[1] == "ffn" else ratio for key, ratio in others.items()}

        low, high = 0, self.largest_of_ffn
        if self._cost(with_ffn(high)) > self.budget:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._cost(with_ffn(middle)) <= self.budget else (middle + 1, high)
        return with_ffn(low)

    def _spend(self, ratios: Ratios) -> Ratios:
        """Widen one dimension by one step at a time, the one that is cut most, as long as a step fits."""
        while True:
            for key in sorted(ratios, key=lambda key: -ratios[key]):
                wider = {**ratios, key: self._one_step_less(key, ratios[key])}
                if ratios[key] > 0 and self._cost(ratios) < self._cost(wider) <= self.budget:
                    ratios = wider
                    break
            else:
                return ratios

    def _one_step_less(self, key: Dimension, ratio: float) -> float:
        """The share at which the largest group of a dimension is one step wider."""
        group = self.dimensions[key]
        whole, align = group.size // group.num_heads, self.align
        if group.kind == "heads":
            whole, align = group.size, 1
        width = min(whole, (int(whole * (1 - ratio) / align + 0.5) + 1) * align)
        return 1 - width / whole

    def _widths(self, ratios: Mapping[Dimension, float]) -> Widths:
        return widths_at(self.groups, ratios, self.align, self.components)

    def _cost(self, ratios: Mapping[Dimension, float]) -> float:
        return cost_of(self.groups, self.costs, self._widths(ratios))

    def _largest(self, keys: Sequence[Dimension]) -> int:
        """The largest common share of these dimensions that leaves every one of them something."""
        for step in range(_GRID - 1, -1, -1):
            with suppress(UserError):
                self._widths({**dict.fromkeys(self.dimensions, 0.0), **dict.fromkeys(keys, step / _GRID)})
                return step
        raise UserError(f"align {self.align} is larger than a width of this network.", fix="Use a smaller `align=`.")
