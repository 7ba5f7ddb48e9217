"""Small questions to ONNX models and small changes of them, for every room that handles graphs."""

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

PRECISION_OF_TYPE: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
"""What a layer computes in whose activations are of this ONNX element type."""


def copied(model: ModelProto) -> ModelProto:
    """A deep copy."""
    result = ModelProto()
    result.CopyFrom(model)
    return result


def graph_inputs(model: ModelProto) -> tuple[ValueInfoProto, ...]:
    """The inputs that a caller feeds: older exporters list weights among the inputs too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return tuple(value for value in model.graph.input if value.name not in weights)


def initializers(model: ModelProto) -> dict[str, Array]:
    """Values of all initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def drop_unused_initializers(model: ModelProto) -> None:
    """Remove the initializers that no node reads and that are no outputs of the graph."""
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def get_attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def opset_of(model: ModelProto) -> int:
    """Version of the ONNX operators that a model uses."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))
