"""Rotate, cut, refit: what makes the same cut lose less, in closed form and without labels."""

from upvits.toolchain.compensation.compress import Compressed, CompressionReport, compress
from upvits.toolchain.compensation.curves import compensated_curves, ffn_curves, with_joint_units
from upvits.toolchain.compensation.refit import LayerReport
from upvits.toolchain.compensation.statistics import MIN_IMAGES, TooFewImagesError
from upvits.toolchain.compensation.weigh import weigh_streams

__all__ = [
    "MIN_IMAGES",
    "Compressed",
    "CompressionReport",
    "LayerReport",
    "TooFewImagesError",
    "compensated_curves",
    "compress",
    "ffn_curves",
    "weigh_streams",
    "with_joint_units",
]
