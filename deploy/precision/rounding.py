"""The rounding of each precision as fp32 nodes, which ONNX Runtime's CPU provider runs in any session."""

import ml_dtypes
import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from upvits.deploy.graphs.nodes import Array

CASTS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp8": TensorProto.FLOAT8E4M3FN}


def rounding_nodes(graph: GraphProto, source: str, result: str, precision: str, scale: float = 1.0) -> list[NodeProto]:
    """Nodes that round an fp32 tensor to a precision, back in fp32. Adds the constants that they need to the graph."""
    if precision in ("fp16", "bf16"):
        return _cast_pair(source, result, CASTS[precision])
    scaled, rounded = f"{result}_scaled", f"{result}_rounded"
    _constant(graph, f"{result}_step", np.float32(scale))
    nodes = [helper.make_node("Div", [source, f"{result}_step"], [scaled], scaled)]
    if precision == "fp8":
        nodes += _cast_pair(scaled, rounded, CASTS["fp8"])
    else:
        for name, bound in (("low", -127.0), ("high", 127.0)):
            _constant(graph, f"{result}_{name}", np.float32(bound))
        nodes.append(helper.make_node("Round", [scaled], [f"{result}_whole"], f"{result}_whole"))
        nodes.append(
            helper.make_node("Clip", [f"{result}_whole", f"{result}_low", f"{result}_high"], [rounded], rounded)
        )
    return [*nodes, helper.make_node("Mul", [rounded, f"{result}_step"], [result], result)]


def rounded(values: Array, precision: str) -> Array:
    """fp32 values rounded to fp16 or bf16."""
    kind = np.dtype(np.float16 if precision == "fp16" else ml_dtypes.bfloat16)
    return values.astype(kind).astype(np.float32)


def _cast_pair(source: str, result: str, data_type: int) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{result}_narrow"], f"{result}_narrow", to=data_type),
        helper.make_node("Cast", [f"{result}_narrow"], [result], result, to=TensorProto.FLOAT),
    ]


def _constant(graph: GraphProto, name: str, value: np.float32) -> None:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
