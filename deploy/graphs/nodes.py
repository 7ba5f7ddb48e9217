"""Small questions to ONNX models and small changes of them, for every room that handles graphs."""

import math
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

_MOST_ROUNDS = 1_000_000
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


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """The nodes of a model, those of its functions, and those within them: branches and bodies of loops."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [inner for graph in _graphs_in(node) for inner in graph.node]


def endless_loops(model: ModelProto) -> tuple[str, ...]:
    """Names of loops that may take more than a million rounds, as far as the graph says; a condition may end them."""
    small = {
        tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64 and _is_small(tensor)
    }
    for node in all_nodes(model):
        if node.op_type == "Constant" and any(a.name == "value" and _is_small(a.t) for a in node.attribute):
            small.add(node.output[0])
    loops = (node for node in all_nodes(model) if node.op_type == "Loop")
    return tuple(node.name or node.output[0] for node in loops if not node.input or node.input[0] not in small)


def circle_of(model: ModelProto) -> tuple[str, ...]:
    """Names of tensors that need each other before they can be computed; empty where there are none."""
    inner = (graph for node in all_nodes(model) for graph in _graphs_in(node))
    for part in (model.graph, *model.functions, *inner):
        needs = {name: _read_by(node) for node in part.node for name in node.output if name}
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            return tuple(error.args[1])
    return ()


def _read_by(node: NodeProto) -> set[str]:
    """Names that a node reads, by itself and within its branches or its body."""
    within = (name for graph in _graphs_in(node) for inner in graph.node for name in _read_by(inner))
    return {*node.input, *within} - {""}


def _graphs_in(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:  # one without a graph gives an empty graph
        yield from (attribute.g, *attribute.graphs)


def _is_small(tensor: TensorProto) -> bool:
    return bool(math.prod(tensor.dims) == 1 and numpy_helper.to_array(tensor).item() <= _MOST_ROUNDS)


def get_attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def opset_of(model: ModelProto) -> int:
    """Version of the ONNX operators that a model uses."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))
