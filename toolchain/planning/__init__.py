"""What to keep: pruning plans and the planners that make them."""

from upvits.toolchain.choices import DEFAULT_COMPONENTS, Component, Planner
from upvits.toolchain.planning.costs import Costs
from upvits.toolchain.planning.counted import CountedCosts, count_costs
from upvits.toolchain.planning.curves import Curve, curve_of
from upvits.toolchain.planning.document import Change, PruningPlan, Size
from upvits.toolchain.planning.global_plan import FLOOR, NotReachableError, plan_within
from upvits.toolchain.planning.plan import plan_by_scores
from upvits.toolchain.planning.request import check_request
from upvits.toolchain.planning.uniform import aligned

__all__ = [
    "DEFAULT_COMPONENTS",
    "FLOOR",
    "Change",
    "Component",
    "Costs",
    "CountedCosts",
    "Curve",
    "NotReachableError",
    "Planner",
    "PruningPlan",
    "Size",
    "aligned",
    "check_request",
    "count_costs",
    "curve_of",
    "plan_by_scores",
    "plan_within",
]
