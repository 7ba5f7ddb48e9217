"""The importance of every unit of every group."""

from toolchain.scores.divergence import divergence
from toolchain.scores.document import METHODS, Method, Scores, check_method
from toolchain.scores.measure import images_digest, score
from toolchain.scores.stability import Stability, unstable

__all__ = [
    "METHODS",
    "Method",
    "Scores",
    "Stability",
    "check_method",
    "divergence",
    "images_digest",
    "score",
    "unstable",
]
