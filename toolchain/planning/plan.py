"""What to keep: from scores and a ratio (or a target, or a smaller published model) to a list of units per group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from calib_data.errors import UserError
from toolchain.families import family_of
from toolchain.groups import widths_of
from toolchain.planning.choose import kept_units
from toolchain.planning.document import DEFAULT_COMPONENTS, Component, PruningPlan, sizer
from toolchain.planning.like import widths_like
from toolchain.planning.request import check_request, check_scores
from toolchain.planning.uniform import search_ratio, uniform_widths
from toolchain.scores import Scores
from toolchain.timm_config import architecture_of


def plan(
    model: nn.Module,
    scores: Scores,
    *,
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    like: nn.Module | None = None,
    align: int = 8,
    components: Sequence[Component] = DEFAULT_COMPONENTS,
    input_size: tuple[int, int, int] | None = None,
) -> PruningPlan:
    """Choose the units to keep. Exactly one of `ratio`, `target_macs`, `target_params` and `like` is given.

    All blocks of a stage get equal widths, and all heads equally many dims, so that the result is again a network that
    stock timm builds (as long as `components` prunes embedding and attention together).

    Args:
        model: the dense network.
        scores: measured on this very network.
        ratio: share of every prunable dimension to remove, in [0, 1).
        target_macs: share of the multiply-accumulates to keep, in (0, 1]; the ratio is searched.
        target_params: share of the parameters to keep, in (0, 1]; the ratio is searched.
        like: a smaller published model of the same family, depth and input; its widths and heads are taken exactly.
            Consecutive heads are merged where it has fewer (UP-ViTs, section 3.3).
        align: widths and head dims become multiples of this (unless they stay whole).
        components: which dimensions to prune; `heads` removes whole heads instead of dims in every head.
        input_size: (channels, height, width) for counting MACs; the model's own by default.

    Raises:
        UserError: the request is out of range, contradictory, or would leave a width of zero.

    Example:
        >>> import timm, toolchain
        >>> dense = timm.create_model("pvt_v2_b0", num_classes=5)
        >>> chosen = toolchain.plan(dense, toolchain.score(dense, method="magnitude"), ratio=0.5)
        >>> chosen.widths.channels["stages.3"], round(chosen.after.macs / chosen.before.macs, 2)
        (128, 0.28)
    """
    asked = {"ratio": ratio, "target_macs": target_macs, "target_params": target_params}
    given: dict[str, float | int | str] = {name: value for name, value in asked.items() if value is not None}
    if len(given) + (like is not None) != 1:
        raise UserError("Give exactly one of ratio, target_macs, target_params and like.")
    groups = family_of(model).groups(model)
    check_scores(model, groups, scores)
    size = sizer(model, input_size)
    if like is not None:
        chosen = widths_like(model, groups, like)
        given = {"like": architecture_of(like)}
    else:
        check_request({name: value for name, value in asked.items() if value is not None}, align, components)
        if ratio is None:
            ratio = search_ratio(groups, size, align, components, target_macs, target_params)
        chosen = uniform_widths(groups, ratio, align, components)
        found = {} if "ratio" in given else {"found_ratio": ratio}
        given = {**given, **found, "align": align, "components": ",".join(components)}
    keep = {g.name: kept_units(g, scores, chosen, "heads" in components) for g in groups if g.name in chosen.channels}
    return PruningPlan(
        keep={name: tuple(units.tolist()) for name, units in keep.items()},
        num_heads=chosen.num_heads,
        architecture=None if like is None else architecture_of(like),
        asked=given,
        before=size(widths_of(groups)),
        after=size(chosen),
        dense_widths=widths_of(groups),
        method=scores.method,
        model_digest=scores.model_digest,
    )
