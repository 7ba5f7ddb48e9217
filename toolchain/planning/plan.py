"""What to keep: from scores and a ratio (or a target, or a smaller published model) to a list of units per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import DEFAULT_COMPONENTS, Component, Planner
from upvits.toolchain.families import family_of, groups_of, skeleton
from upvits.toolchain.networks.depth import after_shortening, shorten
from upvits.toolchain.planning.budget import say_what_is_unused, widths_within
from upvits.toolchain.planning.choose import kept_by_scores
from upvits.toolchain.planning.counted import count_costs
from upvits.toolchain.planning.curves import Curve
from upvits.toolchain.planning.depth_cut import blocks_at_ratio
from upvits.toolchain.planning.document import PruningPlan, sizer
from upvits.toolchain.planning.global_plan import FLOOR, plan_at_size
from upvits.toolchain.planning.like import blocks_like, widths_like
from upvits.toolchain.planning.request import check_request, check_scores, groups_to_cut
from upvits.toolchain.planning.uniform import uniform_widths
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import widths_of
from upvits.toolchain.structure.timm_config import architecture_of


def plan_by_scores(
    model: nn.Module,
    scores: Scores,
    *,
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    like: nn.Module | None = None,
    depth_ratio: float | None = None,
    planner: Planner = "uniform",
    align: int = 8,
    components: Sequence[Component] = DEFAULT_COMPONENTS,
    floor: float = FLOOR,
    curves: Mapping[str, Curve] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> PruningPlan:
    """`toolchain.plan` without images: what the scores say, and with `curves` what each cut is expected to cost.

    Args:
        curves: for `global`: expected losses by group, instead of those that follow from the scores.

    The others are those of `toolchain.plan`.

    Raises:
        UserError: the request is out of range, contradictory, or would leave a width of zero.

    Example:
        >>> import timm
        >>> from upvits import toolchain
        >>> dense = timm.create_model("pvt_v2_b0", num_classes=5)
        >>> chosen = plan_by_scores(dense, toolchain.score(dense, method="magnitude"), ratio=0.5)
        >>> chosen.widths.channels["stages.3"], round(chosen.after.macs / chosen.before.macs, 2)
        (128, 0.28)
    """
    asked = {"ratio": ratio, "target_macs": target_macs, "target_params": target_params}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) + (like is not None) > 1 or not (given or like is not None or depth_ratio is not None):
        raise UserError("Give exactly one of ratio, target_macs, target_params and like (or depth_ratio alone).")
    check_request(given | ({} if depth_ratio is None else {"depth_ratio": depth_ratio}), align, components, planner)
    check_scores(model, groups_to_cut(groups_of(model), components), scores)
    if like is not None:
        if depth_ratio is not None or planner != "uniform":
            raise UserError("A smaller model fixes depth and widths.", fix="Give like without depth_ratio and planner.")
        return _like(model, scores, like, components, input_size)
    if planner == "global" and depth_ratio is not None and "depth" in components:
        raise UserError(
            "The depth is given by depth_ratio, and depth is a component that the planner would choose.",
            fix="Leave out one of them.",
        )
    lists = family_of(model).block_lists(model)
    blocks = {} if depth_ratio is None else blocks_at_ratio(scores, lists, depth_ratio)
    notes: dict[str, float | int | str] = {**given, "align": align, "components": ",".join(components)}
    if depth_ratio is not None:
        notes["depth_ratio"] = depth_ratio
    if planner == "global":
        chosen = plan_at_size(
            model, scores, ratio=ratio, target_macs=target_macs, target_params=target_params, blocks=blocks,
            align=align, components=components, floor=floor, curves=curves, input_size=input_size,
        )  # fmt: skip
        return _checked(replace(chosen, asked={**notes, **chosen.asked}), model, given, align)
    short = shorten(skeleton(model), blocks)
    groups, size = groups_of(short), sizer(short, input_size)
    before = sizer(model, input_size)(widths_of(groups_of(model)))
    if target_macs is None and target_params is None:
        widths = uniform_widths(groups, ratio or 0.0, align, components)
    else:
        asked_for = next(f"{name} {value:g}" for name, value in given.items())
        budget = before.macs * target_macs if target_macs is not None else before.params * (target_params or 0.0)
        costs = count_costs(short, "parameters" if target_macs is None else "MACs", input_size)
        widths = widths_within(groups, costs, budget, align, components, asked_for)
    own_scores = replace(scores, values=after_shortening(scores.values, blocks))
    chosen = PruningPlan(
        keep=kept_by_scores(groups, own_scores, widths, "heads" in components),
        num_heads=widths.num_heads,
        architecture=None,
        asked=notes,
        before=before,
        after=size(widths),
        dense_widths=widths_of(groups_of(model)),
        method=scores.method,
        model_digest=scores.model_digest,
        blocks=blocks,
    )
    return _checked(chosen, short, given, align)


def _checked(plan: PruningPlan, network: nn.Module, given: Mapping[str, float], align: int) -> PruningPlan:
    """The plan, with a warning where it leaves some of its budget."""
    for name, target in given.items():
        if name != "ratio":
            say_what_is_unused(groups_of(network), plan, name, target, align)
    return plan


def _like(
    model: nn.Module,
    scores: Scores,
    like: nn.Module,
    components: Sequence[Component],
    input_size: tuple[int, int, int] | None,
) -> PruningPlan:
    """The plan whose result is exactly the smaller model."""
    blocks = blocks_like(model, scores, like)
    short = shorten(skeleton(model), blocks)
    groups = groups_of(short)
    widths = widths_like(short, groups, like, components)
    own_scores = replace(scores, values=after_shortening(scores.values, blocks))
    check_scores(model, groups_to_cut(groups_of(model), DEFAULT_COMPONENTS), scores)
    return PruningPlan(
        keep=kept_by_scores(groups, own_scores, widths, "heads" in components),
        num_heads=widths.num_heads,
        architecture=architecture_of(like),
        asked={"like": architecture_of(like)},
        before=sizer(model, input_size)(widths_of(groups_of(model))),
        after=sizer(short, input_size)(widths),
        dense_widths=widths_of(groups_of(model)),
        method=scores.method,
        model_digest=scores.model_digest,
        blocks=blocks,
    )
