"""Small graphs and measures that the tests of precision share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from deploy.precision.smoothing import _Paths
from deploy.precision.weight_layers import prepared
from deploy.runtimes.onnxruntime_session import OnnxRuntimeSession

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


def with_outliers(model: ModelProto, seed: int = 0) -> ModelProto:
    """The same function with two channels of every LayerNorm 30 to 100 times as large; its readers take that back."""
    model, random = prepared(model), np.random.default_rng(seed)
    paths = _Paths(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def scale(name: str, by: Array) -> None:
        values = (numpy_helper.to_array(tensors[name]) * by).astype(np.float32)
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))

    for norm in [node for node in model.graph.node if node.op_type == "LayerNormalization"]:
        readers = paths.readers(norm.output[0], len(paths.shape(norm.output[0])) - 1)
        channels = tensors[norm.input[1]].dims[0]
        factor = np.ones(channels)
        factor[random.choice(channels, 2, replace=False)] = random.uniform(30, 100, 2)
        for name in norm.input[1:] if readers else ():
            scale(name, factor)
        for layer in readers:
            rank = len(tensors[layer.weight].dims)
            scale(layer.weight, 1 / factor.reshape([-1 if axis == layer.in_axis else 1 for axis in range(rank)]))
    return model
