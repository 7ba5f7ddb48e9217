"""Precision as a change of the ONNX graph, done before a runtime sees it.

TensorRT 11 and TensorRT-RTX know only strongly typed networks: what the graph says is what runs. So a precision is
written into the graph, and every runtime gets the same graph.
"""

from upvits.deploy.precision.calibration import Ranges, calibrate
from upvits.deploy.precision.convert import QUANTIZED, Converted, convert
from upvits.deploy.precision.emulation import for_cpu
from upvits.deploy.precision.search import PutBack, put_back
from upvits.deploy.precision.sensitivity import layer_sqnr

__all__ = [
    "QUANTIZED",
    "Converted",
    "PutBack",
    "Ranges",
    "calibrate",
    "convert",
    "for_cpu",
    "layer_sqnr",
    "put_back",
]
