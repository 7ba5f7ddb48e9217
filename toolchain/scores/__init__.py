"""The importance of every unit of every group."""

from upvits.toolchain.choices import METHODS, Method
from upvits.toolchain.scores.divergence import divergence
from upvits.toolchain.scores.document import Scores, check_method
from upvits.toolchain.scores.measure import images_digest, score
from upvits.toolchain.scores.stability import Stability, unstable

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
