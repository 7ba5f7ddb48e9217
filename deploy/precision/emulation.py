"""bf16 and fp8 graphs on a CPU, with the rounding that they would have elsewhere."""

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from upvits.deploy.graphs.files import with_shapes
from upvits.deploy.graphs.nodes import Array, copied, drop_unused_initializers, get_attribute, initializers
from upvits.deploy.precision.rounding import rounding_nodes

_BF16, _FP8, _FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT
# These move values that are rounded already.
_MOVING = frozenset({"Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Concat", "Split", "Gather", "Expand"})


def for_cpu(model: ModelProto) -> ModelProto:
    """A model that gives a bf16 or fp8 graph's answers on ONNX Runtime's CPU provider.

    That provider has no bf16 arithmetic, and runs fp8 Q/DQ only without most of its optimizations. Here the arithmetic
    is fp32, and every tensor that is bf16 or fp8 is rounded to it. fp16 and int8 stay: the provider runs them itself.
    """
    result = copied(with_shapes(model))
    values = [*result.graph.input, *result.graph.value_info, *result.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in result.graph.initializer}
    if {_BF16, _FP8}.isdisjoint(types.values()):
        return result
    weights = initializers(result)
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and types[node.input[2]] == _FP8:
            nodes += _fp8(result.graph, node, weights, types)
        else:
            nodes += _bf16(result.graph, node, types)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    for tensor in result.graph.initializer:
        if tensor.data_type == _BF16:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(np.float32), tensor.name))
    drop_unused_initializers(result)
    del result.graph.value_info[:]
    return with_shapes(result)


def _bf16(graph: onnx.GraphProto, node: NodeProto, types: dict[str, int]) -> list[NodeProto]:
    """The node in fp32, its bf16 outputs rounded."""
    for attribute in node.attribute:
        if attribute.name == "to" and node.op_type == "Cast" and attribute.i == _BF16:
            attribute.i = _FLOAT
    nodes = [node]
    for index, name in enumerate(node.output):
        if types.get(name) == _BF16 and node.op_type not in _MOVING:
            node.output[index] = f"{name}_exact"
            nodes += rounding_nodes(graph, f"{name}_exact", name, "bf16")
    return nodes


def _fp8(graph: onnx.GraphProto, node: NodeProto, weights: dict[str, Array], types: dict[str, int]) -> list[NodeProto]:
    """A constant for a weight's DequantizeLinear, a rounding for an activation's pair of nodes."""
    result, kind = node.output[0], types.get(node.output[0], _FLOAT)
    scale = np.asarray(weights[node.input[1]], np.float32)
    if node.op_type == "QuantizeLinear":
        source = f"{result}_wide"
        nodes = [helper.make_node("Cast", [node.input[0]], [source], source, to=_FLOAT)]
        return nodes + rounding_nodes(graph, source, result, "fp8", float(scale))
    if node.input[0] not in weights:  # the rounding above scaled back already
        return [helper.make_node("Cast", [node.input[0]], [result], node.name, to=_FLOAT if kind == _BF16 else kind)]
    values = np.asarray(weights[node.input[0]]).astype(np.float32)
    axis = get_attribute(node, "axis", 1)
    shape = [-1 if other == axis else 1 for other in range(values.ndim)] if scale.ndim else []
    exact = (values * scale.reshape(shape)).astype(np.float16 if kind == TensorProto.FLOAT16 else np.float32)
    graph.initializer.append(numpy_helper.from_array(exact, result))
    return []
