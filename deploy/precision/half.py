"""fp16 and bf16: a graph that computes in half precision, except where that would cost accuracy.

Q/DQ nodes of int8 and fp8 layers get scales of the half type too: fp32 left around them would keep attention unfused
(reference: 0 of 12 blocks of DeiT-T). So quantize first, then convert what is left.
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.files import with_shapes
from upvits.deploy.graphs.nodes import drop_unused_initializers, opset_of
from upvits.deploy.graphs.surgery import PREPROCESS
from upvits.deploy.precision.weight_layers import prepared, with_opset

HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_BF16_OPSET = 22  # where Conv takes bf16

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
    }
)
_MAX_FP16 = float(np.finfo(np.float16).max)


def to_half(model: ModelProto, precision: str, *, keep_nodes: Collection[str] = ()) -> ModelProto:
    """A copy of an fp32 model that computes in fp16 or bf16, between inputs and outputs that stay fp32.

    LayerNorm, softmax, other reductions and the preprocessing of uint8 inputs stay fp32. Each tensor is cast at most
    once in each direction. A bf16 model has opset 22 at least, the first in which convolutions take bf16.

    Args:
        model: fp32 ONNX model without subgraphs, every tensor type inferable; int8 and fp8 layers may be in it.
        precision: "fp16" or "bf16".
        keep_nodes: names of further nodes that stay fp32.

    Raises:
        UserError: a weight is too large for fp16 (named), the graph has control flow, or the opset cannot be raised.
    """
    result = prepared(model)
    if precision == "bf16" and opset_of(result) < _BF16_OPSET:
        result = with_shapes(with_opset(result, _BF16_OPSET))
    _HalfConversion(result, precision, frozenset(keep_nodes)).run()
    drop_unused_initializers(result)
    return with_shapes(result)


class _HalfConversion:
    """One pass over the nodes in topological order, remembering in which type every tensor can be had."""

    def __init__(self, model: ModelProto, precision: str, keep_nodes: frozenset[str]) -> None:
        self.precision = precision
        self.graph = model.graph
        self.keep_nodes = keep_nodes
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}
        typed = [*self.graph.input, *self.graph.output, *self.graph.value_info]
        self.floats = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.floats |= {name for name, tensor in self.weights.items() if tensor.data_type == TensorProto.FLOAT}
        # Names under which a float tensor of the original graph exists now.
        self.as_fp32: dict[str, str] = {name: name for name in self.floats}
        self.as_half: dict[str, str] = {}
        self.nodes: list[NodeProto] = []

    def run(self) -> None:
        for node in self.graph.node:
            self._convert(node)
        for name in [name for name in self.outputs if name in self.floats and name not in self.as_fp32]:
            self.nodes.append(
                onnx.helper.make_node("Cast", [self.as_half[name]], [name], f"{name}_cast", to=TensorProto.FLOAT)
            )
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]

    def _convert(self, node: NodeProto) -> None:
        stays = node.op_type in _KEPT_IN_FP32 or node.name in self.keep_nodes or node.name.startswith(PREPROCESS)
        for index, name in enumerate(node.input):
            if name in self.floats:
                node.input[index] = self._fp32(name) if stays else self._half(name)
        for index, name in enumerate(node.output):
            if name in self.floats and not stays:
                # An output of the graph keeps its name for the cast to fp32 at the end.
                node.output[index] = self.as_half[name] = f"{name}_{self.precision}" if name in self.outputs else name
                del self.as_fp32[name]
        if node.op_type == "Cast" and not stays:
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = HALVES[self.precision]
        self.nodes.append(node)

    def _half(self, name: str) -> str:
        if name not in self.as_half:
            self.as_half[name] = f"{name}_{self.precision}"
            if name in self.weights:
                self.graph.initializer.append(_half_tensor(self.weights[name], self.as_half[name], self.precision))
            else:
                self._cast(self.as_fp32[name], self.as_half[name], HALVES[self.precision])
        return self.as_half[name]

    def _fp32(self, name: str) -> str:
        if name not in self.as_fp32:
            self.as_fp32[name] = name if name in self.outputs else f"{name}_fp32"
            self._cast(self.as_half[name], self.as_fp32[name], TensorProto.FLOAT)
        return self.as_fp32[name]

    def _cast(self, source: str, target: str, data_type: int) -> None:
        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], f"{target}_cast", to=data_type))


def _half_tensor(tensor: TensorProto, name: str, precision: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    if precision == "bf16":
        return numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _MAX_FP16:
        raise UserError(
            f"{tensor.name} does not fit fp16",
            why=f"Its largest value is {largest:.4g}, fp16 ends at {_MAX_FP16:.0f}.",
            fix="Use bf16 or fp32 for this model.",
        )
    return numpy_helper.from_array(values.astype(np.float16), name)
