"""fp16 and bf16 graphs: the same answer, half the bytes, and fp32 where it matters."""

import collections

import numpy as np
import onnx
import pytest

from tests.deploy.conftest import Exported
from upvits.calib_data.errors import UserError
from upvits.deploy.precision import for_cpu
from upvits.deploy.precision.half import to_half
from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession

FLOAT, HALF, BF16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_half_precision_answers_like_fp32(name: str, precision: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    original = onnx.load(exported.report.path)
    before = original.SerializeToString()
    model = to_half(original, precision)
    assert original.SerializeToString() == before
    onnx.checker.check_model(model, full_check=True)
    images = exported.images.numpy()
    ours, theirs = (
        OnnxRuntimeSession(m.SerializeToString(), threads=1).run({"images": images})["logits"]
        for m in (for_cpu(model), original)
    )
    noise, signal = np.square(ours - theirs).sum(), np.square(theirs).sum()
    assert 10 * np.log10(signal / noise) > {"fp16": 50.0, "bf16": 32.0}[precision]
    assert noise > 0.0  # it did compute in half precision
    # The smallest models are half graph, half weights.
    weights = [sum(len(tensor.raw_data) for tensor in m.graph.initializer) for m in (original, model)]
    assert weights[1] < 0.6 * weights[0]
    assert [entry.value for entry in model.metadata_props] == [entry.value for entry in original.metadata_props]


def test_products_are_fp16_and_norms_softmax_and_ends_are_fp32(pvt: Exported) -> None:
    model = to_half(onnx.load(pvt.report.path), "fp16")
    types = types_of(model)
    by_operator: dict[str, set[int]] = collections.defaultdict(set)
    for node in model.graph.node:
        by_operator[node.op_type] |= {types[name] for name in [node.input[0], *node.output]}
    assert by_operator["MatMul"] == by_operator["Conv"] == by_operator["Gelu"] == by_operator["Add"] == {HALF}
    assert by_operator["LayerNormalization"] == by_operator["Softmax"] == {FLOAT}
    assert types["images"] == types["logits"] == FLOAT
    casts = [(*node.input, node.attribute[0].i) for node in model.graph.node if node.op_type == "Cast"]
    assert len(casts) == len(set(casts))  # each tensor once in each direction


def tiny(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [value("x", FLOAT, ["batch", 4])],
        [value(name, FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_an_output_that_is_read_inside_too_and_a_weight_shared_by_both_kinds() -> None:
    node = onnx.helper.make_node
    weights = {"w": np.eye(4), "ones": np.ones(4)}
    nodes = [
        node("MatMul", ["x", "w"], ["y"], "product"),
        node("LayerNormalization", ["y", "ones", "ones"], ["n1"], "norm1"),
        node("LayerNormalization", ["y", "ones", "ones"], ["n2"], "norm2"),
        node("Add", ["n1", "ones"], ["shifted"], "shift"),
        node("Add", ["shifted", "n2"], ["z"], "sum"),
    ]
    model = tiny(nodes, weights, outputs=("y", "z"))
    half = to_half(model, "fp16")
    onnx.checker.check_model(half, full_check=True)
    assert [value.name for value in half.graph.output] == ["y", "z"]
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    for ours, theirs in zip(
        OnnxRuntimeSession(half.SerializeToString(), threads=1).run({"x": x}).values(),
        OnnxRuntimeSession(model.SerializeToString(), threads=1).run({"x": x}).values(),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=5e-3)
        assert ours.dtype == np.float32


def test_named_nodes_stay() -> None:
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    kept = to_half(tiny(nodes, {"w": np.eye(4)}), "fp16", keep_nodes=["product"])
    assert [node.op_type for node in kept.graph.node] == ["MatMul"]
    assert types_of(kept)["w"] == FLOAT


def test_a_weight_beyond_fp16_is_named() -> None:
    nodes = [onnx.helper.make_node("MatMul", ["x", "huge"], ["y"], "product")]
    with pytest.raises(UserError, match="huge does not fit fp16"):
        to_half(tiny(nodes, {"huge": np.full((4, 4), 1e5)}), "fp16")


def test_bf16_holds_what_fp16_does_not() -> None:
    nodes = [onnx.helper.make_node("MatMul", ["x", "huge"], ["y"], "product")]
    assert types_of(to_half(tiny(nodes, {"huge": np.full((4, 4), 1e5)}), "bf16"))["huge_bf16"] == BF16


def test_control_flow_is_refused() -> None:
    branch = onnx.helper.make_graph([], "branch", [], [])
    node = onnx.helper.make_node("If", ["x"], ["y"], "choice", then_branch=branch, else_branch=branch)
    with pytest.raises(UserError, match="choice"):
        to_half(tiny([node], {}), "fp16")
