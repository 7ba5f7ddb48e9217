"""The importance of every unit of every group."""

from upvits.toolchain.choices import METHODS, Method
from upvits.toolchain.scores.divergence import divergence
from upvits.toolchain.scores.document import Scores
from upvits.toolchain.scores.measure import images_digest, score
from upvits.toolchain.scores.stability import Stability, unstable

__all__ = [
    "METHODS",
    "Method",
    "Scores",
    "Stability",
    "divergence",
    "images_digest",
    "score",
    "unstable",
]
