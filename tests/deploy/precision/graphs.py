"""Small graphs and measures that the tests of precision share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession

Array = np.ndarray[Any, np.dtype[Any]]


def graph_of(
    nodes: Sequence[NodeProto],
    weights: dict[str, Array],
    shape: Sequence[int | str],
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
) -> ModelProto:
    """A model from x of this shape; weights keep their types."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        list(nodes),
        "tiny",
        [value("x", onnx.TensorProto.FLOAT, shape)],
        [value(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def run(model: ModelProto, images: Array) -> Array:
    """The first output."""
    with OnnxRuntimeSession(model.SerializeToString(), threads=1) as session:
        return next(iter(session.run({session.input_names[0]: images}).values()))


def sqnr(reference: Array, other: Array) -> float:
    """Signal over error in dB."""
    noise = np.square(reference.astype(np.float64) - other).sum()
    return float("inf") if noise == 0 else float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise))
