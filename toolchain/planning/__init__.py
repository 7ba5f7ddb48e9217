"""What to keep: pruning plans and the planners that make them."""

from toolchain.planning.curves import Curve, curve_of
from toolchain.planning.document import DEFAULT_COMPONENTS, Component, PruningPlan, Size
from toolchain.planning.plan import plan
from toolchain.planning.request import check_request
from toolchain.planning.uniform import aligned

__all__ = [
    "DEFAULT_COMPONENTS",
    "Component",
    "Curve",
    "PruningPlan",
    "Size",
    "aligned",
    "check_request",
    "curve_of",
    "plan",
]
