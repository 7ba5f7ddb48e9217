"""One budget over all groups: the widths, and the depth, with the smallest expected loss.

Given the widths of the stream and the blocks that are left, the losses and the costs of the branches add up, and the
best widths are a multiple-choice knapsack. Around it stands a search over stream widths and depth; a lower bound tells
which of them are worth solving.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import Component
from upvits.toolchain.families import family_of, groups_of, skeleton
from upvits.toolchain.networks.depth import after_shortening, name_after, shorten
from upvits.toolchain.planning.branches import (
    Branch,
    Option,
    allowed_sizes,
    branches_of,
    curves_for,
    floors_of,
    sizes_of,
)
from upvits.toolchain.planning.choose import kept_by_scores
from upvits.toolchain.planning.costs import Costs
from upvits.toolchain.planning.counted import count_costs
from upvits.toolchain.planning.curves import Curve
from upvits.toolchain.planning.depth_cut import Pairs, blocks_left, merged_steps
from upvits.toolchain.planning.document import PruningPlan, sizer, widths_kept
from upvits.toolchain.planning.knapsack import Item, cheapest_choice, hull, lower_bound
from upvits.toolchain.planning.request import check_scores, groups_to_cut
from upvits.toolchain.planning.uniform import uniform_widths
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import ChannelGroup, Widths, widths_of

FLOOR = 0.1
"""Share of its units that every group keeps at least, so that no layer collapses."""

_SOLVED = 6  # stream widths and depths, the most promising first, for which the knapsack is solved
_STEPS = 32  # common shares of all stage widths that are tried before each stage is refined


class NotReachableError(UserError):
    """The budget is below what the floors leave.

    Attributes:
        lowest: the smallest cost that can be had, in the unit of the costs.
    """

    def __init__(self, what: str, *, why: str, fix: str, lowest: float) -> None:
        super().__init__(what, why=why, fix=fix)
        self.lowest = lowest


@dataclass(frozen=True, slots=True)
class _Depth:
    """Some number of blocks.

    Attributes:
        blocks: see `PruningPlan.blocks`.
        loss: KL in nats by the depth paths.
    """

    blocks: dict[str, Pairs]
    loss: float


def plan_within(
    model: nn.Module,
    scores: Scores,
    costs: Costs,
    budget: float,
    *,
    components: Sequence[Component],
    align: int = 8,
    floor: float = FLOOR,
    curves: Mapping[str, Curve] | None = None,
    floors: Mapping[str, int] | None = None,
    blocks: Mapping[str, Pairs] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> PruningPlan:
    """The plan with the smallest expected loss whose cost is within a budget.

    Args:
        model: the dense network.
        scores: measured on it, in nats.
        costs: of its branches and of the rest, by the dense network's group names.
        budget: in the unit of the costs.
        components: what may be cut; `depth` among them lets blocks leave where that is the better use of the budget.
        align: widths (dims per head) are multiples of this, or whole.
        floor: share of its units that every group keeps at least.
        curves: expected losses by group, instead of those that follow from the scores.
        floors: least units by group, instead of those that follow from `floor`.
        blocks: the blocks that are left, where the depth was chosen already.
        input_size: (channels, height, width) for the sizes in the plan; the model's own by default.

    Raises:
        NotReachableError: not even the floors fit into the budget.
        UserError: scores without unit, or without depth where `depth` is among the components.
    """
    if not 0 <= floor <= 1:
        raise UserError(f"floor {floor} is out of range.", fix="Give a share in [0, 1].")
    groups = groups_of(model)
    check_scores(model, groups_to_cut(groups, components), scores)
    losses = curves_for(groups, components, scores, curves)
    least = floors or floors_of(groups, floor)
    search = _Search(groups, branches_of(groups, losses, components, align, least), losses, costs, budget)
    depths = [_Depth(dict(blocks or {}), 0.0)]
    if "depth" in components:
        depths = _depths(model, scores)
    embeds = [group for group in groups if group.kind == "embed"]
    cut = "embed" in components
    dims = {g.name: _stream_sizes(g, align, least[g.name], losses) if cut else [g.size] for g in embeds}
    depth, stream, options = search.run(depths, dims)
    channels = dict(stream) if cut else {}
    num_heads = {}
    for branch in (branch for branch in search.branches if branch.name in options):
        option = options[branch.name]
        for name, size in sizes_of(branch, option).items():
            channels[str(name_after(name, depth.blocks))] = size
        if option.heads and branch.groups:
            num_heads[str(name_after(branch.name, depth.blocks))] = option.heads
    short = shorten(skeleton(model), depth.blocks)
    # curves tell how many units go; which ones is for the scores to say, since rotated dims are none of the network's
    scores_left = replace(scores, values=after_shortening(scores.values, depth.blocks))
    keep = kept_by_scores(groups_of(short), scores_left, Widths(channels, num_heads), "heads" in components)
    return PruningPlan(
        keep=keep,
        num_heads=num_heads,
        architecture=None,
        asked={
            "budget": budget,
            "unit": costs.unit,
            "align": align,
            "components": ",".join(components),
            "floor": floor,
        },
        before=sizer(model, input_size)(widths_of(groups)),
        after=sizer(short, input_size)(widths_kept(keep, num_heads)),
        dense_widths=widths_of(groups),
        method=scores.method,
        model_digest=scores.model_digest,
        blocks=depth.blocks,
        planner="global",
    )


def _stream_sizes(group: ChannelGroup, align: int, least: int, curves: Mapping[str, Curve]) -> list[int]:
    """Widths that a stream may take: as allowed, and not beyond what was measured."""
    loss = curves[group.name].loss
    return [size for size in allowed_sizes(group, align, least) if math.isfinite(float(loss[group.size - size]))]


def _depths(model: nn.Module, scores: Scores) -> list[_Depth]:
    """The network as it is, and after every step of the merged depth paths."""
    lists = family_of(model).block_lists(model)
    blocks_left(scores, {n: min(1, count - 1) for n, count in lists.items()}, "The component depth lets blocks leave")
    taken = dict.fromkeys(scores.depth, 0)
    result = [_Depth({}, 0.0)]
    for name in merged_steps(scores.depth):
        taken[name] += 1
        loss = sum(max(scores.depth[n].loss[:count], default=0.0) for n, count in taken.items())
        result.append(_Depth(blocks_left(scores, taken, ""), max(loss, result[-1].loss)))
    return result


class _Search:
    """Stream widths and depth by lower bounds, then the exact choice of widths for the best of them."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        branches: Sequence[Branch],
        curves: Mapping[str, Curve],
        costs: Costs,
        budget: float,
    ) -> None:
        self.sizes = {group.name: group.size for group in groups if group.kind == "embed"}
        self.branches, self.curves, self.costs, self.budget = branches, curves, costs, budget
        self.items: dict[tuple[str, int], Item] = {}
        self.prices: dict[tuple[str, str, int, tuple[tuple[int, int], ...]], NDArray[np.float64]] = {}
        self.hulls: dict[tuple[str, int], Item] = {}
        self.bounds: dict[tuple[int, tuple[int, ...]], float] = {}

    def run(
        self, depths: Sequence[_Depth], dims: Mapping[str, list[int]]
    ) -> tuple[_Depth, dict[str, int], dict[str, Option]]:
        """The best depth, stream widths and widths of the branches that are left.

        Args:
            depths: the candidates, losses rising.
            dims: the candidates for the width of every embed group, rising.
        """
        best = math.inf
        for index, depth in enumerate(depths):
            if depth.loss >= best:
                break  # losses of depth only rise
            best = min(best, self._explore(index, depth, dims))
        ranked = sorted((bound, *key) for key, bound in self.bounds.items() if bound < math.inf)
        best, result = math.inf, None
        for bound, index, stream in ranked[:_SOLVED]:
            if bound >= best:
                break
            named = dict(zip(dims, stream, strict=True))
            solved = self._solve(depths[index], named)
            if solved is not None and solved[0] < best:
                best, result = solved[0], (depths[index], named, solved[1])
        if result is None:
            raise self._not_reachable(depths, {name: sizes[0] for name, sizes in dims.items()})
        return result

    def _explore(self, index: int, depth: _Depth, dims: Mapping[str, list[int]]) -> float:
        """Bounds of stream widths at one depth: all of one stage's; common shares, then stage by stage, of several."""
        if len(dims) == 1:
            return min(self._bound(index, depth, (size,)) for size in next(iter(dims.values())))
        longest = max(map(len, dims.values()))
        steps = min(longest, _STEPS)
        shares = [step / max(1, steps - 1) for step in range(steps)]
        starts = {tuple(sizes[round(share * (len(sizes) - 1))] for sizes in dims.values()) for share in shares}
        best, stream = min((self._bound(index, depth, stream), stream) for stream in starts)
        while True:
            near = [(self._bound(index, depth, other), other) for other in _neighbours(stream, list(dims.values()))]
            bound, other = min(near, default=(math.inf, stream))
            if bound >= best:
                return best
            best, stream = bound, other

    def _bound(self, index: int, depth: _Depth, stream: tuple[int, ...]) -> float:
        """No plan of this depth and these stream widths can lose less."""
        if (index, stream) not in self.bounds:
            dims = dict(zip(self.sizes, stream, strict=True))
            hulls = [self._hull(branch, dims[branch.stream]) for branch in self._left(depth)]
            free = self.budget - self.costs.fixed(dims)
            self.bounds[index, stream] = depth.loss + self._stream_loss(dims) + lower_bound(hulls, free)
        return self.bounds[index, stream]

    def _solve(self, depth: _Depth, dims: dict[str, int]) -> tuple[float, dict[str, Option]] | None:
        """The exact choice of widths, and its loss."""
        branches = self._left(depth)
        items = [self._item(branch, dims[branch.stream]) for branch in branches]
        picked = cheapest_choice(items, self.budget - self.costs.fixed(dims))
        if picked is None:
            return None
        chosen = {branch.name: branch.options[pick] for branch, pick in zip(branches, picked, strict=True)}
        return depth.loss + self._stream_loss(dims) + sum(option.loss for option in chosen.values()), chosen

    def _left(self, depth: _Depth) -> list[Branch]:
        return [branch for branch in self.branches if name_after(branch.name, depth.blocks) is not None]

    def _stream_loss(self, dims: Mapping[str, int]) -> float:
        cut = {name: self.sizes[name] - size for name, size in dims.items() if size < self.sizes[name]}
        return sum(float(self.curves[name].loss[gone]) for name, gone in cut.items())

    def _item(self, branch: Branch, dim: int) -> Item:
        if (branch.name, dim) not in self.items:
            widths = tuple(option.width for option in branch.options)
            listed, _, part = branch.name.rsplit(".", 2)
            alike = listed, part, dim, widths  # all blocks of a list cost the same
            if alike not in self.prices:
                prices = [self.costs.branch(branch.name, dim, width) for width in widths]
                self.prices[alike] = np.array(prices, dtype=np.float64)
            losses = np.array([option.loss for option in branch.options])
            self.items[branch.name, dim] = Item(self.prices[alike], losses)
        return self.items[branch.name, dim]

    def _hull(self, branch: Branch, dim: int) -> Item:
        if (branch.name, dim) not in self.hulls:
            self.hulls[branch.name, dim] = hull(self._item(branch, dim))
        return self.hulls[branch.name, dim]

    def _not_reachable(self, depths: Sequence[_Depth], floors: Mapping[str, int]) -> NotReachableError:
        """Which floor stops it, at the depth that gets cheapest."""
        fixed = self.costs.fixed(floors)

        def parts(depth: _Depth) -> dict[str, float]:
            costs = {"the embeddings and the head": fixed, "the attention": 0.0, "the FFNs": 0.0}
            for branch in self._left(depth):
                kind = "the FFNs" if branch.options[0].heads == 0 else "the attention"
                costs[kind] += self._item(branch, floors[branch.stream]).costs.min()
            return costs

        least = min((parts(depth) for depth in depths), key=lambda costs: sum(costs.values()))
        lowest, largest = sum(least.values()), max(least, key=lambda part: least[part])
        shares = ", ".join(f"{name} {cost:,.4g}" for name, cost in least.items())
        return NotReachableError(
            f"A budget of {self.budget:,.6g} {self.costs.unit} cannot be reached.",
            why=f"With every group at its floor, {lowest:,.6g} {self.costs.unit} are left ({shares}); "
            f"most is held by {largest}.",
            fix="Ask for more, lower the floor or the alignment, or let more components be pruned (depth, embed).",
            lowest=lowest,
        )


def _neighbours(stream: tuple[int, ...], sizes: Sequence[list[int]]) -> Iterator[tuple[int, ...]]:
    """Stream widths that differ by up to two steps in one stage, or by one step in two."""
    for stage, widths in enumerate(sizes):
        at = widths.index(stream[stage])
        for step in (-2, -1, 1, 2):
            if 0 <= at + step < len(widths):
                moved = (*stream[:stage], widths[at + step], *stream[stage + 1 :])
                yield moved
                for other in range(stage + 1, len(sizes)):
                    narrower = sizes[other].index(stream[other]) - step
                    if abs(step) == 1 and 0 <= narrower < len(sizes[other]):
                        yield (*moved[:other], sizes[other][narrower], *moved[other + 1 :])


def plan_at_size(
    model: nn.Module,
    scores: Scores,
    *,
    ratio: float | None,
    target_macs: float | None,
    target_params: float | None,
    blocks: Mapping[str, Pairs],
    components: Sequence[Component],
    align: int,
    floor: float,
    curves: Mapping[str, Curve] | None,
    input_size: tuple[int, int, int] | None,
) -> PruningPlan:
    """The global plan at the MACs of a uniform one, at a share of the MACs, or at a share of the parameters.

    Args:
        ratio: share of every dimension that the uniform plan would remove.
        target_macs: share of the MACs to keep.
        target_params: share of the parameters to keep.

    The others are those of `plan_within`.
    """
    if target_params is not None:
        before = sizer(model, input_size)(widths_of(groups_of(model)))
        costs, budget = count_costs(model, "parameters", input_size), math.floor(target_params * before.params)
    else:
        costs = count_costs(model, "MACs", input_size)
        budget = _macs_budget(model, ratio or 0.0, target_macs, blocks, components, align, input_size)
    return plan_within(
        model, scores, costs, budget, components=components, align=align, floor=floor, curves=curves,
        blocks=blocks, input_size=input_size,
    )  # fmt: skip


def _macs_budget(
    model: nn.Module,
    ratio: float,
    target: float | None,
    blocks: Mapping[str, Pairs],
    components: Sequence[Component],
    align: int,
    input_size: tuple[int, int, int] | None,
) -> int:
    """The MACs to keep: a share of the dense network's, or those of the uniform plan."""
    if target is not None:
        return math.floor(target * sizer(model, input_size)(widths_of(groups_of(model))).macs)
    short = shorten(skeleton(model), blocks)
    widths_only: list[Component] = [component for component in components if component != "depth"]
    return sizer(short, input_size)(uniform_widths(groups_of(short), ratio, align, widths_only)).macs
