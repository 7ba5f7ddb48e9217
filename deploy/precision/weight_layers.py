"""Layers with constant weights: what int8 and fp8 are about, and the form in which this package reads them.

The products inside attention multiply activations with activations: they are no such layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.files import with_shapes
from upvits.deploy.graphs.nodes import copied, get_attribute, opset_of

MIN_OPSET = 19  # QuantizeLinear knows fp16 scales and fp8 from here on
_IR_VERSION = 10


@dataclass(frozen=True, slots=True)
class WeightLayer:
    """A MatMul, Gemm or Conv whose second input is a constant.

    Attributes:
        name: name of the node.
        source: tensor that it reads: [..., in] of MatMul, [rows, in] of Gemm, [batch, in, ...] of Conv.
        weight: initializer: [in, out] of MatMul; [in, out], with transB [out, in] of Gemm; [out, in / groups, ...] of
            Conv.
        result: tensor that it makes.
        out_axis: axis of the weight that counts output channels.
        in_axis: axis of the weight that counts input channels.
        groups: of Conv, else 1.
    """

    name: str
    op: str
    source: str
    weight: str
    result: str
    out_axis: int
    in_axis: int
    groups: int = 1


def prepared(model: ModelProto) -> ModelProto:
    """A copy in which every node has a name, constants are initializers, and the opset is 19 or later.

    Raises:
        UserError: the graph has control flow, or its opset cannot be raised.
    """
    opset = opset_of(model)
    result = with_opset(model, MIN_OPSET) if opset < MIN_OPSET else copied(model)
    result.ir_version = max(result.ir_version, _IR_VERSION)
    graph = result.graph
    taken = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise UserError(
                f"node {node.name} ({node.op_type}) cannot be converted to another precision",
                why="It holds a subgraph (control flow), which the conversions do not follow.",
                fix="Use fp32 for this model.",
            )
        if not node.name:
            name = f"{node.op_type}_{index}"
            node.name = name if name not in taken else f"{name}_unnamed"
    _constants_to_initializers(graph)
    if opset < MIN_OPSET:
        del graph.value_info[:]
    return with_shapes(result)


def with_opset(model: ModelProto, opset: int) -> ModelProto:
    """The model in a later opset.

    Raises:
        UserError: onnx cannot convert it.
    """
    try:
        result = onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # the converter is C++ and raises RuntimeError, ConvertError and others
        raise UserError(
            f"the model cannot be brought from opset {opset_of(model)} to {opset}",
            why=f"onnx says: {error}",
            fix=f"Export it again with opset {opset} or later.",
        ) from error
    result.ir_version = max(model.ir_version, _IR_VERSION)
    if not result.metadata_props:
        result.metadata_props.extend(model.metadata_props)
    return result


def weight_layers(model: ModelProto) -> tuple[WeightLayer, ...]:
    """All layers with constant weights of a prepared model, in order."""
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if _is_float(tensor)}
    return tuple(_layers(model, dims))


def _layers(model: ModelProto, dims: dict[str, tuple[int, ...]]) -> Iterator[WeightLayer]:
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain not in ("", "ai.onnx"):
            continue
        if node.input[1] not in dims or node.input[0] in dims:
            continue
        names = (node.name, node.op_type, node.input[0], node.input[1], node.output[0])
        if node.op_type == "Conv":
            yield WeightLayer(*names, out_axis=0, in_axis=1, groups=get_attribute(node, "group", 1))
        elif len(dims[node.input[1]]) == 2 and not get_attribute(node, "transA", 0):
            out_axis = 0 if get_attribute(node, "transB", 0) else 1
            yield WeightLayer(*names, out_axis=out_axis, in_axis=1 - out_axis)


def nothing_to_quantize() -> UserError:
    return UserError(
        "the model has nothing to quantize",
        why="It has no matrix product or convolution with constant fp32 weights.",
        fix="Use fp32, fp16 or bf16 for it.",
    )


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Constants become initializers; so do the Identity and Transpose of constants, as some exporters hold weights."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    nodes = []
    for node in graph.node:
        tensor = None if node.output[0] in outputs else _constant(node, constants)
        if tensor is None:
            nodes.append(node)
        else:
            tensor.name = node.output[0]
            constants[tensor.name] = tensor
    inputs = [value for value in graph.input if value.name not in constants]
    for field, values in (("node", nodes), ("initializer", list(constants.values())), ("input", inputs)):
        kept = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(field)
        getattr(graph, field).extend(kept)


def _constant(node: NodeProto, constants: dict[str, TensorProto]) -> TensorProto | None:
    if node.op_type == "Constant" and node.attribute[0].name in ("value", "value_float", "value_int", "value_ints"):
        attribute = onnx.helper.get_attribute_value(node.attribute[0])
        if isinstance(attribute, TensorProto):
            return attribute
        kind = np.float32 if node.attribute[0].name == "value_float" else np.int64
        return numpy_helper.from_array(np.asarray(attribute, kind))
    if node.op_type not in ("Identity", "Transpose") or node.input[0] not in constants:
        return None
    value = numpy_helper.to_array(constants[node.input[0]])
    if node.op_type == "Transpose":
        value = np.ascontiguousarray(value.transpose(get_attribute(node, "perm", None)))
    return numpy_helper.from_array(value)


def _is_float(tensor: TensorProto) -> bool:
    return bool(tensor.data_type == TensorProto.FLOAT)
