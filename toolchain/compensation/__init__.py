"""Rotate, cut, refit: what makes the same cut lose less, in closed form and without labels."""

from toolchain.compensation.compress import Compressed, CompressionReport, compress
from toolchain.compensation.curves import compensated_curves
from toolchain.compensation.refit import LayerReport

__all__ = ["Compressed", "CompressionReport", "LayerReport", "compensated_curves", "compress"]
