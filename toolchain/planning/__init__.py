"""What to keep: pruning plans and the planners that make them."""

from toolchain.planning.costs import Costs
from toolchain.planning.counted import count_costs
from toolchain.planning.curves import Curve, curve_of
from toolchain.planning.document import DEFAULT_COMPONENTS, Change, Component, Planner, PruningPlan, Size
from toolchain.planning.global_plan import FLOOR, NotReachableError, plan_within
from toolchain.planning.plan import plan
from toolchain.planning.request import check_request
from toolchain.planning.uniform import aligned

__all__ = [
    "DEFAULT_COMPONENTS",
    "FLOOR",
    "Change",
    "Component",
    "Costs",
    "Curve",
    "NotReachableError",
    "Planner",
    "PruningPlan",
    "Size",
    "aligned",
    "check_request",
    "count_costs",
    "curve_of",
    "plan",
    "plan_within",
]
