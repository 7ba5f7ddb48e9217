"""ONNX models that are not ours, made by hand."""

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT = TensorProto.FLOAT


def finish(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Array]) -> ModelProto:
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="others")
    onnx.checker.check_model(model, full_check=True)
    return model


def two_inputs() -> ModelProto:
    """Pictures of any size and a vector; two outputs."""
    rng = np.random.default_rng(3)
    weights = {
        "kernel": rng.normal(size=(6, 3, 3, 3)).astype(np.float32),
        "matrix": rng.normal(size=(5, 10)).astype(np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["picture", "kernel"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Concat", ["f", "vector"], ["both"], "join", axis=1),
        helper.make_node("Gemm", ["both", "matrix", "bias"], ["scores"], "gemm", transB=1),
        helper.make_node("Softmax", ["scores"], ["shares"], "share"),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("picture", FLOAT, ["n", 3, "h", "w"]), value("vector", FLOAT, ["n", 4])]
    return finish(nodes, inputs, [value("scores", FLOAT, ["n", 5]), value("shares", FLOAT, ["n", 5])], weights)


def quantized(*, convolution: bool = False) -> tuple[ModelProto, Array]:
    """Two products that read one quantized tensor [n, 8, 32], and perhaps a convolution; the output in fp32 numbers.

    int8 around 0, weights per output channel.
    """
    rng = np.random.default_rng(4)
    matrices = {name: rng.normal(size=(32, 16)).astype(np.float32) for name in ("left", "right")}
    weights: dict[str, Array] = {"x_scale": np.array(4 / 127, np.float32), "x_zero": np.array(0, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["dq"], "dequantize"),
    ]
    for name, matrix in matrices.items():
        scale = (np.abs(matrix).max(0) / 127).astype(np.float32)
        weights[f"{name}_q"] = np.round(matrix / scale).astype(np.int8)
        weights |= {f"{name}_scale": scale, f"{name}_zero": np.zeros(16, np.int8)}
        constant = [f"{name}_q", f"{name}_scale", f"{name}_zero"]
        nodes.append(helper.make_node("DequantizeLinear", constant, [f"{name}_dq"], f"{name}_dequantize", axis=1))
        nodes.append(helper.make_node("MatMul", ["dq", f"{name}_dq"], [name], name))
    nodes.append(helper.make_node("Mul", ["left", "right"], ["product"], "times"))
    if convolution:
        weights |= {"k_q": np.ones((8, 8, 1), np.int8), "k_scale": np.array(0.1, np.float32)}
        weights |= {"k_zero": np.array(0, np.int8)}
        nodes.append(helper.make_node("DequantizeLinear", ["k_q", "k_scale", "k_zero"], ["k"], "kernel_dequantize"))
        nodes.append(helper.make_node("Conv", ["dq", "k"], ["mixed"], "conv"))
        nodes.append(helper.make_node("ReduceSum", ["mixed"], ["sum"], "sum", keepdims=0))
        nodes.append(helper.make_node("Add", ["product", "sum"], ["y"], "add"))
    else:
        nodes.append(helper.make_node("Identity", ["product"], ["y"], "end"))
    value = helper.make_tensor_value_info
    model = finish(nodes, [value("x", FLOAT, ["n", 8, 32])], [value("y", FLOAT, ["n", 8, 16])], weights)
    x = pictures_of(2)
    return model, (x @ matrices["left"]) * (x @ matrices["right"])


def pictures_of(count: int) -> Array:
    return np.random.default_rng(5).normal(size=(count, 8, 32)).astype(np.float32)


def computed(model: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """What the standard says comes out."""
    outputs = ReferenceEvaluator(model).run(None, feeds)
    assert isinstance(outputs, list)
    return outputs


def decibel(expected: Array, output: Array) -> float:
    return float(10 * np.log10((expected**2).sum() / ((expected - output) ** 2).sum()))
