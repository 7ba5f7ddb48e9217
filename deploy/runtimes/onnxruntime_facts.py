"""What ONNX Runtime made of a graph, read from the graph that it optimised and from its profiler's trace.

Nothing here needs the library.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.graphs.nodes import PRECISION_OF_TYPE, copied, drop_unused_initializers, get_attribute
from upvits.deploy.runtimes.interface import Built, LayerTime

_INT8_GEMMS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
_GEMMS = frozenset({"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"})
_ATTENTION = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention", "PackedAttention", "QAttention"})
_REFORMATS = frozenset({"MemcpyFromHost", "MemcpyToHost", "ReorderInput", "ReorderOutput", "Reshape", "Transpose"})
_TRACE_NAMES = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "uint8": "int8",
    "float8e4m3fn": "fp8",
}
_KERNEL = "_kernel_time"


def built_of(optimised: ModelProto, model: ModelProto) -> Built:
    """What was built of `model`, from the graph as ONNX Runtime runs it (weights may be missing from it)."""
    types, constant = _types(optimised), _constants(optimised)
    gemms: dict[str, int] = {}
    by_precision: dict[str, int] = {}
    nodes = optimised.graph.node
    for node in nodes:
        precision = _precision(node, types)
        by_precision[precision] = by_precision.get(precision, 0) + 1
        if _is_weight_gemm(node, constant):
            gemms[precision] = gemms.get(precision, 0) + 1
    facts = GraphFacts(model)
    return Built(
        source="graph optimised by ONNX Runtime",
        layers=len(nodes),
        by_precision=by_precision,
        gemms=gemms,
        planned=facts.gemms(),
        attention_blocks=facts.attention_blocks(),
        attention_fused=sum(node.op_type in _ATTENTION for node in nodes),
        casts=sum(node.op_type == "Cast" for node in nodes),
        reformats=sum(node.op_type in _REFORMATS for node in nodes),
        memory_bytes=None,
    )


def layer_times_of(trace: Path) -> tuple[LayerTime, ...]:
    """Median time of every node in a profiler's trace of some calls, in the order of execution."""
    events_of: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for event in json.loads(trace.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            key = (event["name"].removesuffix(_KERNEL), event["args"]["op_name"])
            events_of.setdefault(key, []).append(event)
    return tuple(
        LayerTime(
            name=name,
            op=op,
            ms=float(np.median([event["dur"] for event in events])) / 1e3,
            precision=_traced_precision(op, events[-1]["args"]),
            bytes=sum(int(events[-1]["args"][key]) for key in ("activation_size", "parameter_size", "output_size")),
        )
        for (name, op), events in events_of.items()
    )


def unsigned_activations(model: ModelProto) -> ModelProto:
    """The same numbers with activations in uint8 around zero point 128 where they were int8 around 0.

    ONNX Runtime's kernels for x86 take unsigned activations. It changes them itself, except where several layers read
    the same quantized tensor: 10 of 24 matrix products of PVTv2-B0 stayed in fp32 for that reason. Told to run
    signed activations (`session.qdqisint8allowed`), it took five times as long as in fp32 on a CPU with AVX-512 VNNI
    and AMX.
    """
    result = copied(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        following = readers.get(node.output[0], [])
        around = [node, *following]
        if (
            node.op_type != "QuantizeLinear"
            or node.input[0] in weights
            or node.output[0] in outputs
            or any(reader.op_type != "DequantizeLinear" for reader in following)
            or not all(len(n.input) == 3 and _is_int8_zero(weights.get(n.input[2])) for n in around)
        ):
            continue
        zero = f"{node.output[0]}_unsigned_zero_point"
        graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), zero))
        for changed in around:
            changed.input[2] = zero
    del graph.value_info[:]
    drop_unused_initializers(result)  # ONNX Runtime warns of each
    return result


def biases_apart(model: ModelProto) -> ModelProto:
    """The same numbers with the biases of quantized Gemm nodes added after them.

    ONNX Runtime's integer kernel for Gemm takes a bias only as integers; with a bias in fp32 it multiplies in fp32.
    """
    result = copied(model)
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        quantized = node.op_type == "Gemm" and len(node.input) == 3 and {*node.input[:2]} <= dequantized
        if quantized and get_attribute(node, "beta", 1.0) == 1 and node.input[2] not in dequantized:
            bias, copy.output[0] = copy.input.pop(), f"{node.output[0]}_without_bias"
            nodes.append(helper.make_node("Add", [copy.output[0], bias], [node.output[0]], f"{node.name}_bias"))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _is_int8_zero(tensor: TensorProto | None) -> bool:
    if tensor is None or tensor.data_type != TensorProto.INT8 or tensor.dims:
        return False
    return int(numpy_helper.to_array(tensor)) == 0


def _types(model: ModelProto) -> dict[str, int]:
    """Element types of tensors: stated, or following from the nodes, which may be ONNX Runtime's operators."""
    graph = model.graph
    types = {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = int(value.type.tensor_type.elem_type)
    for node in graph.node:
        if node.output and not types.get(node.output[0]):
            made = _made_type(node, types)
            for name in node.output:
                types.setdefault(name, made)
    return types


def _made_type(node: NodeProto, types: Mapping[str, int]) -> int:
    if node.op_type == "Cast":
        return int(next(attribute.i for attribute in node.attribute if attribute.name == "to"))
    if node.op_type == "QuantizeLinear":
        return types.get(node.input[2], 0) if len(node.input) > 2 else int(TensorProto.UINT8)
    if node.op_type == "DequantizeLinear":
        return types.get(node.input[1], 0)
    if node.op_type in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return int(TensorProto.FLOAT)
    if node.op_type in ("Shape", "Size"):
        return int(TensorProto.INT64)
    if node.op_type == "Constant":
        return next((int(a.t.data_type) for a in node.attribute if a.name == "value"), 0)
    return types.get(node.input[0], 0) if node.input else 0


def _constants(model: ModelProto) -> set[str]:
    """Names of weights, whatever is done to them before use."""
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        through = ("Cast", "DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze")
        if node.op_type == "Constant" or (node.op_type in through and node.input[0] in constant):
            constant.update(node.output)
    return constant


def _is_weight_gemm(node: NodeProto, constant: set[str]) -> bool:
    if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm"):
        return node.input[3] in constant
    return node.op_type in (_GEMMS | _INT8_GEMMS) and len(node.input) > 1 and node.input[1] in constant


def _precision(node: NodeProto, types: Mapping[str, int]) -> str:
    if node.op_type in _INT8_GEMMS:
        return "int8"
    if node.op_type in _GEMMS:
        return PRECISION_OF_TYPE.get(
            types.get(node.input[0], 0), PRECISION_OF_TYPE.get(types.get(node.input[1], 0), "other")
        )
    return PRECISION_OF_TYPE.get(types.get(node.output[0], 0), "other") if node.output else "other"


def _traced_precision(op: str, args: Mapping[str, Any]) -> str:
    if op in _INT8_GEMMS:
        return "int8"
    made = args["output_type_shape"]
    return _TRACE_NAMES.get(next(iter(made[0]), ""), "other") if made else "other"


def load_optimised(path: Path) -> ModelProto:
    """The graph that ONNX Runtime wrote, without the weights that it put beside it."""
    return onnx.load_model(str(path), load_external_data=False)
