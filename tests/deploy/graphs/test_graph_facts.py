"""What graphs ask for, on graphs whose answer is known."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.deploy.conftest import Exported
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.precision import calibrate, convert

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], elem_type: int = FLOAT) -> onnx.ModelProto:
    """A model of 4 x 4 matrices from "x" to "y"."""
    ends = [helper.make_tensor_value_info(name, elem_type, [4, 4]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "small", ends[:1], ends[1:], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


EYE = np.eye(4, dtype=np.float32)
SCALE = np.array(0.1, np.float32)
ZERO = np.array(0, np.int8)


def quantized(*, images: bool, weights: bool, cast: bool = False) -> onnx.ModelProto:
    """x times a matrix, either of which may be int8; with a change of type after the DequantizeLinear."""
    nodes, factors = [], ["x", "w"]
    if images:
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], "q"),
            helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], "dq"),
        ]
        factors[0] = "xd"
    if weights:
        nodes.append(helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"], "wdq"))
        factors[1] = "wd"
    if cast:
        for index, name in enumerate(factors):
            nodes.append(helper.make_node("Cast", [name], [f"{name}h"], f"cast{index}", to=HALF))
        factors = [f"{name}h" for name in factors]
    nodes.append(helper.make_node("MatMul", factors, ["y"], "product"))
    constants: dict[str, np.ndarray[Any, Any]] = {"w": EYE, "wq": EYE.astype(np.int8), "scale": SCALE, "zero": ZERO}
    return graph(nodes, constants, FLOAT)


@pytest.mark.parametrize(
    ("images", "weights", "cast", "precision"),
    [
        (False, False, False, "fp32"),
        (True, True, False, "int8"),
        (True, True, True, "int8"),
        (False, True, False, "fp32"),  # int8 weights alone are multiplied in fp32
        (True, False, False, "fp32"),
        (False, False, True, "fp16"),
    ],
)
def test_a_product_is_int8_when_both_factors_are(images: bool, weights: bool, cast: bool, precision: str) -> None:
    facts = GraphFacts(quantized(images=images, weights=weights, cast=cast))
    assert facts.gemm_nodes() == {"product": precision}
    assert facts.gemms() == {precision: 1}


def test_a_nameless_product_is_named_after_its_output() -> None:
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": EYE})
    assert GraphFacts(model).gemm_nodes() == {"node_of_y": "fp32"}


def test_products_of_activations_or_of_constants_are_not_counted() -> None:
    nodes = [
        helper.make_node("MatMul", ["w", "w"], ["ww"], "folded"),
        helper.make_node("MatMul", ["x", "x"], ["xx"], "activations"),
        helper.make_node("MatMul", ["w", "xx"], ["wx"], "weight_first"),
        helper.make_node("Add", ["wx", "ww"], ["y"], "sum"),
    ]
    assert GraphFacts(graph(nodes, {"w": EYE})).gemm_nodes() == {"weight_first": "fp32"}


def attention(*between: str, softmax_last: bool = False) -> onnx.ModelProto:
    """Two products of activations with a softmax between them, and operators on the way there."""
    nodes, name = [helper.make_node("MatMul", ["x", "x"], ["s0"], "scores")], "s0"
    for index, op in enumerate(between):
        inputs = {"Mul": [name, "half"], "Add": [name, name], "Cast": [name]}[op]
        attributes: dict[str, Any] = {"to": FLOAT} if op == "Cast" else {}
        nodes.append(helper.make_node(op, inputs, [f"s{index + 1}"], f"step{index}", **attributes))
        name = f"s{index + 1}"
    nodes.append(helper.make_node("Softmax", [name], ["y" if softmax_last else "p"], "soft"))
    if not softmax_last:
        nodes.append(helper.make_node("MatMul", ["p", "x"], ["y"], "mixed"))
    return graph(nodes, {"half": np.array(0.5, np.float32)})


@pytest.mark.parametrize("between", [(), ("Mul",), ("Mul", "Add", "Cast")])
def test_attention_is_a_softmax_between_products(between: tuple[str, ...]) -> None:
    assert GraphFacts(attention(*between)).attention_nodes() == ("soft",)
    assert GraphFacts(attention(*between, softmax_last=True)).attention_blocks() == 0


def test_a_long_chain_of_sums_is_searched_in_no_time() -> None:
    # every Add reads its input twice: 2 ** 60 ways through the graph
    assert GraphFacts(attention(*["Add"] * 60)).attention_blocks() == 1


@pytest.mark.parametrize(("name", "products", "blocks"), [("vit", 10, 2), ("pvt", 32, 4)])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_real_graphs_in_every_precision(
    name: str, products: int, blocks: int, precision: str, request: pytest.FixtureRequest
) -> None:
    exported: Exported = request.getfixturevalue(name)
    model = onnx.load(exported.report.path)
    ranges = calibrate(model, [exported.images.numpy()], quiet=True) if precision in ("int8", "fp8") else None
    converted = convert(model, precision, ranges=ranges)
    facts = GraphFacts(converted.model)
    assert sum(facts.gemms().values()) == products
    assert facts.gemms()[precision] == (len(converted.quantized) if ranges is not None else products)
    assert facts.attention_blocks() == blocks
