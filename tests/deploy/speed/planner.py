"""A planner for tests: the smallest uniform ratio whose costs stay within a budget."""

from collections.abc import Callable

from torch import nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.speed.table import predicted
from upvits.toolchain.planning import NotReachableError, PruningPlan
from upvits.toolchain.planning.costs import Costs


def uniform_planner(model: nn.Module, align: int = 8) -> Callable[[Costs, float], PruningPlan]:
    scores = toolchain.score(model, method="magnitude")
    plans = {}
    for step in range(20):
        try:
            plan = toolchain.plan(model, scores, ratio=step / 20, align=align)
        except UserError:
            continue
        plans[step] = plan, toolchain.delete_units(model, plan)

    def within(costs: Costs, budget: float) -> PruningPlan:
        for plan, network in plans.values():
            if predicted(costs, network) <= budget:
                return plan
        least = predicted(costs, network)
        raise NotReachableError(
            f"At least {least:.3g} {costs.unit}.", why="Alignment is the floor.", fix="", lowest=least
        )

    return within
