"""The importance of every unit of every group."""

from toolchain.scores.divergence import divergence
from toolchain.scores.document import METHODS, Method, Scores, check_method
from toolchain.scores.measure import score

__all__ = ["METHODS", "Method", "Scores", "check_method", "divergence", "score"]
