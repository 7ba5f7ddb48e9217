"""Whether the proxy set was large enough for the choice of units that a plan made."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.depth import name_before
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.scores import Scores, Stability, unstable
from upvits.toolchain.scores.stability import stability_of
from upvits.toolchain.structure.groups import Widths


def unsteady(plan: PruningPlan, scores: Scores, dense: nn.Module, rotated: Collection[str]) -> dict[str, Stability]:
    """Groups that were cut by scores whose halves would keep other units, worst first, by the dense network's names.

    Args:
        plan: what was cut; judged are the numbers of units that it keeps.
        scores: that it was made from.
        dense: the network.
        rotated: groups whose basis was turned, so that the scores of their units decided nothing.
    """
    if not scores.halves:
        return {}
    groups = groups_of(dense)
    decided = {name_before(name, plan.blocks) for name in plan.keep}
    if "heads" in plan.components:  # whole heads go by scores of their own
        decided |= {f"{name}.heads" for name in decided}
    turned = {name_before(name, plan.blocks) for name in rotated}
    decided -= turned | {f"{name}.{part}" for name in turned for part in ("qk", "v")}
    if "ffn_units" in plan.asked:  # what the other units can stand in for chose them
        decided -= {group.name for group in groups if group.kind == "ffn"}
    kept = plan.widths
    widths = Widths(
        {name_before(name, plan.blocks): size for name, size in kept.channels.items()},
        {name_before(name, plan.blocks): heads for name, heads in kept.num_heads.items()},
    )
    stability = stability_of(groups, scores.halves, widths)
    return {name: stability[name] for name in unstable(stability) if name in decided}
