"""Pruning in rounds: cut a little, score what is left, cut again.

Scores say what the output loses when one unit leaves a whole network. After a cut they no longer hold: of two units
that stood in for each other, the one that is left has become important. Measuring again between several smaller cuts
sees that (iterative pruning, Han et al., arXiv 1506.02626, section 3.3). The result is one plan for the dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of, skeleton
from upvits.toolchain.networks.depth import after_shortening, shorten
from upvits.toolchain.planning import DEFAULT_COMPONENTS, Component, Planner, PruningPlan, plan_by_scores
from upvits.toolchain.planning.branches import floors_of
from upvits.toolchain.planning.choose import kept_by_scores
from upvits.toolchain.planning.counted import count_costs
from upvits.toolchain.planning.document import sizer, widths_kept
from upvits.toolchain.planning.global_plan import FLOOR, plan_within
from upvits.toolchain.planning.uniform import ratios_of, widths_at
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import Widths
from upvits.toolchain.surgery.deletion import delete_units

Score = Callable[[nn.Module, Widths | None], Scores]
"""Scores a network; also gets the widths that will be cut to, where they are known before the scores are."""


def plan_in_rounds(
    model: nn.Module,
    score: Score,
    rounds: int,
    *,
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    depth_ratio: float | None = None,
    planner: Planner = "uniform",
    align: int = 8,
    components: Sequence[Component] = DEFAULT_COMPONENTS,
    floor: float = FLOOR,
    input_size: tuple[int, int, int] | None = None,
) -> PruningPlan:
    """A plan that was made in steps, with scores of what was left before each of them.

    What is kept falls geometrically: after round i, `uniform` keeps (1 - ratio)^(i / rounds) of every dimension, and
    `global` (share to keep)^(i / rounds) of the cost. Blocks that `depth_ratio` removes leave in the first round.

    Args:
        model: the dense network; it is not changed.
        score: called once per round, first with the dense network.
        rounds: number of steps; 1 is `plan_by_scores`.

    The others are those of `toolchain.plan`.

    Returns:
        One plan for the dense network.

    Raises:
        UserError: rounds is no positive number, or as `plan_by_scores` raises it.
    """
    if rounds < 1:
        raise UserError(f"rounds {rounds} is out of range.", fix="Give a whole number of at least 1.")
    first = score(model, None)
    final = plan_by_scores(
        model, first, ratio=ratio, target_macs=target_macs, target_params=target_params, depth_ratio=depth_ratio,
        planner=planner, align=align, components=components, floor=floor, input_size=input_size,
    )  # fmt: skip
    if rounds == 1:
        return final
    if planner == "uniform":
        result = _uniform_rounds(model, score, first, rounds, final, align, components)
    else:
        result = _global_rounds(model, score, first, rounds, final, floor, input_size)
    after = sizer(shorten(skeleton(model), result.blocks), input_size)(widths_kept(result.keep, result.num_heads))
    return replace(result, after=after, asked={**final.asked, "rounds": rounds}, planner=planner)


def _uniform_rounds(
    model: nn.Module,
    score: Score,
    first: Scores,
    rounds: int,
    final: PruningPlan,
    align: int,
    components: Sequence[Component],
) -> PruningPlan:
    """Equal shares in every round; widths are those of the dense network's ratios, so that rounding doesn't add up."""
    groups = groups_of(shorten(skeleton(model), final.blocks))
    removed = ratios_of(groups, final.widths, components)
    plan = replace(final, keep={}, num_heads={})
    now = replace(first, values=after_shortening(first.values, final.blocks))
    for index in range(1, rounds + 1):
        ratios = {key: 1 - (1 - ratio) ** (index / rounds) for key, ratio in removed.items()}
        widths = widths_at(groups, ratios, align, components)
        network = delete_units(model, plan)
        scores = score(network, widths) if index > 1 else now
        keep = kept_by_scores(groups_of(network), scores, widths, "heads" in components)
        plan = joined(plan, keep, widths.num_heads, {})
    return plan


def _global_rounds(
    model: nn.Module,
    score: Score,
    first: Scores,
    rounds: int,
    final: PruningPlan,
    floor: float,
    input_size: tuple[int, int, int] | None,
) -> PruningPlan:
    """A falling budget, and in every round one choice over all groups that are left; floors are the dense network's."""
    unit: Literal["MACs", "parameters"] = "MACs" if final.asked["unit"] == "MACs" else "parameters"
    whole, budget = float(final.before.macs if unit == "MACs" else final.before.params), float(final.asked["budget"])
    floors = floors_of(groups_of(model), floor)
    plan, network, scores = None, model, first
    for index in range(1, rounds + 1):
        now = plan_within(
            network,
            scores,
            count_costs(network, unit, input_size),
            budget if index == rounds else whole * (budget / whole) ** (index / rounds),
            components=final.components,
            align=int(final.asked["align"]),
            floors=floors if plan is None else after_shortening(floors, plan.blocks),
            blocks=final.blocks if plan is None and "depth" not in final.components else None,
            input_size=input_size,
        )
        plan = now if plan is None else joined(plan, now.keep, now.num_heads, now.blocks)
        if index < rounds:
            network = delete_units(model, plan)
            scores = score(network, None)
    assert plan is not None
    return plan


def joined(
    first: PruningPlan,
    keep: Mapping[str, tuple[int, ...]],
    num_heads: Mapping[str, int],
    blocks: Mapping[str, tuple[tuple[int, int], ...]],
) -> PruningPlan:
    """One plan for the dense network that does what two plans do one after the other.

    Args:
        first: for the dense network.
        keep: of the second plan, by the groups of the network that the first one leaves.
        num_heads: of the second plan.
        blocks: of the second plan.

    Returns:
        The first plan with another `keep`, `num_heads` and `blocks`; its sizes are those of the first.
    """
    before = after_shortening(first.keep, blocks)
    modules = {name.removesuffix(".qk") for name in (*before, *keep) if name.endswith(".qk")}
    before, now = _apart(before, modules), _apart(keep, modules)
    both = dict(before)
    for name, units in now.items():
        both[name] = tuple(before[name][unit] for unit in units) if name in before else units
    lists = dict(first.blocks)
    for name, pairs in blocks.items():
        old = lists.get(name)
        lists[name] = pairs if old is None else tuple((old[attn][0], old[ffn][1]) for attn, ffn in pairs)
    heads = {**after_shortening(first.num_heads, blocks), **num_heads}
    return replace(first, keep=both, num_heads=heads, blocks=lists)


def _apart(keep: Mapping[str, tuple[int, ...]], modules: set[str]) -> dict[str, tuple[int, ...]]:
    """The same units, with q·k and v of some attentions named on their own."""
    result = {name: units for name, units in keep.items() if name not in modules}
    for module in modules & keep.keys():
        result |= {f"{module}.qk": keep[module], f"{module}.v": keep[module]}
    return result
