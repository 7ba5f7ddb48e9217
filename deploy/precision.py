"""Precision as a change of the ONNX graph.

TensorRT 11 and TensorRT-RTX know only strongly typed networks: what the graph says is what runs. So a precision is
written into the graph, and every runtime gets the same one.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from calib_data.errors import UserError
from deploy.graph import PREPROCESS

PRECISIONS = ("fp32", "fp16")

# Reductions lose the most in half precision; the other operators make tensors of a type that they state themselves.
_KEPT_IN_FP32 = frozenset(
    {
        "LayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "Softmax",
        "LogSoftmax",
        "ReduceMean",
        "ReduceSum",
        "Pow",
        "Sqrt",
        "Constant",
        "ConstantOfShape",
        "Range",
        "EyeLike",
        "RandomNormal",
        "RandomUniform",
        "Resize",
        "RoiAlign",
        "NonMaxSuppression",
        "QuantizeLinear",
        "DequantizeLinear",
    }
)
_MAX_FP16 = float(np.finfo(np.float16).max)


def convert(model: ModelProto, precision: str) -> ModelProto:
    """The model in this precision; the same object for "fp32".

    Raises:
        UserError: a weight does not fit the precision.
    """
    if precision == "fp32":
        return model
    if precision == "fp16":
        return to_fp16(model)
    raise UserError(f"unknown precision {precision!r}", fix=f"Precisions: {', '.join(PRECISIONS)}.")


def to_fp16(model: ModelProto, *, keep_nodes: Sequence[str] = ()) -> ModelProto:
    """A copy of an fp32 model that computes in fp16, between inputs and outputs that stay fp32.

    LayerNorm, softmax, other reductions and the preprocessing of uint8 inputs stay fp32. Each tensor is cast at most
    once in each direction.

    Args:
        model: fp32 ONNX model without subgraphs, every tensor type inferable.
        keep_nodes: names of further nodes that stay fp32.

    Raises:
        UserError: a weight is too large for fp16 (named), or the graph has control flow.
    """
    result = onnx.shape_inference.infer_shapes(model)
    _Fp16Conversion(result, frozenset(keep_nodes)).run()
    return onnx.shape_inference.infer_shapes(result)


class _Fp16Conversion:
    """One pass over the nodes in topological order, remembering in which type every tensor can be had."""

    def __init__(self, model: ModelProto, keep_nodes: frozenset[str]) -> None:
        self.graph = model.graph
        self.keep_nodes = keep_nodes
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}
        typed = [*self.graph.input, *self.graph.output, *self.graph.value_info]
        self.floats = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.floats |= {name for name, tensor in self.weights.items() if tensor.data_type == TensorProto.FLOAT}
        # Names under which a float tensor of the original graph exists now.
        self.as_fp32: dict[str, str] = {name: name for name in self.floats}
        self.as_fp16: dict[str, str] = {}
        self.nodes: list[NodeProto] = []

    def run(self) -> None:
        for node in self.graph.node:
            self._convert(node)
        for name in [name for name in self.outputs if name in self.floats and name not in self.as_fp32]:
            self.nodes.append(
                onnx.helper.make_node("Cast", [self.as_fp16[name]], [name], f"{name}_cast", to=TensorProto.FLOAT)
            )
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _convert(self, node: NodeProto) -> None:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise UserError(
                f"node {node.name} ({node.op_type}) cannot be converted to fp16",
                why="It holds a subgraph (control flow), which this conversion does not follow.",
                fix="Use fp32 for this model.",
            )
        stays = node.op_type in _KEPT_IN_FP32 or node.name in self.keep_nodes or node.name.startswith(PREPROCESS)
        for index, name in enumerate(node.input):
            if name in self.floats:
                node.input[index] = self._fp32(name) if stays else self._fp16(name)
        for index, name in enumerate(node.output):
            if name in self.floats and not stays:
                # An output of the graph keeps its name for the cast to fp32 at the end.
                node.output[index] = self.as_fp16[name] = f"{name}_fp16" if name in self.outputs else name
                del self.as_fp32[name]
        if node.op_type == "Cast" and not stays:
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
        self.nodes.append(node)

    def _fp16(self, name: str) -> str:
        if name not in self.as_fp16:
            self.as_fp16[name] = f"{name}_fp16"
            if name in self.weights:
                self.graph.initializer.append(_half(self.weights[name], self.as_fp16[name]))
            else:
                self._cast(self.as_fp32[name], self.as_fp16[name], TensorProto.FLOAT16)
        return self.as_fp16[name]

    def _fp32(self, name: str) -> str:
        if name not in self.as_fp32:
            self.as_fp32[name] = name if name in self.outputs else f"{name}_fp32"
            self._cast(self.as_fp16[name], self.as_fp32[name], TensorProto.FLOAT)
        return self.as_fp32[name]

    def _cast(self, source: str, target: str, data_type: int) -> None:
        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], f"{target}_cast", to=data_type))


def _half(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _MAX_FP16:
        raise UserError(
            f"{tensor.name} does not fit fp16",
            why=f"Its largest value is {largest:.4g}, fp16 ends at {_MAX_FP16:.0f}.",
            fix="Use fp32 for this model.",
        )
    return numpy_helper.from_array(values.astype(np.float16), name)
