"""Rotate, cut, refit: what makes the same cut lose less, in closed form and without labels."""

from toolchain.compensation.compress import Compressed, CompressionReport, compress
from toolchain.compensation.curves import compensated_curves
from toolchain.compensation.refit import LayerReport
from toolchain.compensation.statistics import TooFewImagesError

__all__ = ["Compressed", "CompressionReport", "LayerReport", "TooFewImagesError", "compensated_curves", "compress"]
