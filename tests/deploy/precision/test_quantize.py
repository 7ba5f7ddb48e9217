"""int8 and fp8 graphs: what is quantized and how, on models of ours and of others."""

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from tests.deploy.conftest import Exported
from tests.deploy.precision.graphs import Array, graph_of, run, sqnr
from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.nodes import initializers
from upvits.deploy.precision import Ranges, calibrate, convert, for_cpu
from upvits.deploy.precision.quantize import quantizable_layers, quantized_weight
from upvits.deploy.precision.weight_layers import prepared

node = onnx.helper.make_node


def makers(model: ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: own for own in model.graph.node for name in own.output}


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rest", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_weight_layers_are_int8_and_attention_is_not(name: str, rest: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    original, images = onnx.load(exported.report.path), exported.images.numpy()
    before = original.SerializeToString()
    ranges = calibrate(original, [images], quiet=True)
    converted = convert(original, "int8", ranges=ranges, base_precision=rest)
    assert original.SerializeToString() == before
    model = converted.model
    onnx.checker.check_model(model, full_check=True)
    made, values = makers(model), initializers(model)
    rest_type = TensorProto.FLOAT16 if rest == "fp16" else TensorProto.FLOAT
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    attention = 0
    for own in model.graph.node:
        if own.name in converted.quantized:
            source, weight = (made[name] for name in own.input[:2])
            assert source.op_type == weight.op_type == "DequantizeLinear"
            assert values[weight.input[0]].dtype == values[source.input[2]].dtype == np.int8
            assert tensors[source.input[1]].data_type == tensors[weight.input[1]].data_type == rest_type
            assert not values[weight.input[2]].any()
            assert not values[source.input[2]].any()
            if len(own.input) == 3:
                assert tensors[own.input[2]].data_type == rest_type  # the bias
        elif own.op_type == "MatMul":
            attention += 1
            assert "DequantizeLinear" not in {made[name].op_type for name in own.input}
    assert attention == 2 * sum(own.op_type == "Softmax" for own in model.graph.node)
    products = sum(own.op_type in ("MatMul", "Gemm", "Conv") for own in model.graph.node)
    patch_embedding = 1 if rest == "fp32" else 0  # stays on CPUs
    assert len(converted.quantized) == products - attention - patch_embedding
    quantizers = [own.input[0] for own in model.graph.node if own.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(set(quantizers))  # what several layers read is quantized once
    assert sqnr(run(original, images), run(model, images)) > 27.0


def test_weights_have_a_scale_per_channel_except_where_the_result_is_cut(vit: Exported) -> None:
    original = onnx.load(vit.report.path)
    model = convert(original, "int8", ranges=calibrate(original, [vit.images.numpy()], quiet=True)).model
    made, values = makers(model), initializers(model)
    scales = {}
    for own in model.graph.node:
        if own.op_type in ("MatMul", "Conv", "Gemm") and made[own.input[1]].op_type == "DequantizeLinear":
            weight = made[own.input[1]]
            scales[values[weight.input[0]].shape] = values[weight.input[1]].shape
    assert scales == {
        (48, 3, 16, 16): (48,),
        (48, 144): (),  # q, k and v
        (48, 48): (48,),
        (48, 192): (192,),
        (192, 48): (48,),
        (7, 48): (7,),  # the classifier is a Gemm with transB
    }


@pytest.mark.parametrize(("axis", "shape"), [(0, (6, 3, 2, 2)), (1, (5, 6)), (None, (5, 6))])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_weight_survives_within_half_a_step(precision: str, axis: int | None, shape: tuple[int, ...]) -> None:
    weight = random(*shape) * np.float32(1e-4)  # scales are tiny
    values, scale = quantized_weight(weight, precision, axis)
    assert (scale == scale.astype(np.float16)).all()  # a cast of the rest to fp16 changes nothing
    assert np.abs(values.astype(np.float32)).max() <= (127 if precision == "int8" else 448)
    wide = scale.reshape([-1 if other == axis else 1 for other in range(weight.ndim)])
    step = wide if precision == "int8" else np.maximum(np.abs(weight) / 8, wide / 512)
    assert (np.abs(values.astype(np.float32) * wide - weight) <= 0.501 * step).all()


def foreign_model() -> ModelProto:
    """As other exporters make them: no names, constants as nodes, a transposed weight, opset 13, dynamic axes."""
    constant = node("Constant", [], ["w1"], value=numpy_helper.from_array(random(8, 16)))
    transposed = node("Transpose", ["w2"], ["w2_t"], perm=[1, 0])
    nodes = [
        constant,
        node("MatMul", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        transposed,
        node("MatMul", ["b", "w2_t"], ["c"]),
        node("ReduceMean", ["c"], ["d"], axes=[1], keepdims=0),
        node("Gemm", ["d", "w3", "bias"], ["e"], alpha=0.5),
        node("Gemm", ["e", "w4"], ["y"], transB=1),
    ]
    weights = {
        "w2": random(12, 16, seed=1),
        "w3": random(12, 9, seed=2),
        "bias": random(9, seed=3),
        "w4": random(5, 9, seed=4),
    }
    return graph_of(nodes, weights, ["batch", "tokens", 8], opset=13)


@pytest.mark.parametrize("rest", ["fp16", "fp32"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_models_of_others(precision: str, rest: str) -> None:
    original, batch = foreign_model(), random(3, 7, 8, seed=5)
    ranges = calibrate(original, [batch, batch[:, :4]], quiet=True)
    converted = convert(original, precision, ranges=ranges, base_precision=rest)
    onnx.checker.check_model(converted.model, full_check=True)
    assert len(converted.quantized) == len(set(converted.quantized)) == 4
    assert converted.model.opset_import[0].version >= 19
    assert sqnr(run(original, batch), run(for_cpu(converted.model), batch)) > (35 if precision == "int8" else 23)


def test_large_convolutions_have_no_fp8_kernels() -> None:
    nodes = [node("Conv", ["x", "large"], ["a"], "large"), node("Conv", ["a", "small"], ["y"], "small")]
    model = prepared(graph_of(nodes, {"large": random(4, 3, 6, 6), "small": random(4, 4, 5, 5)}, ["batch", 3, 16, 16]))
    assert [layer.name for layer in quantizable_layers(model, "fp8")] == ["small"]
    assert [layer.name for layer in quantizable_layers(model, "int8")] == ["large", "small"]


def test_cpus_get_quantized_results_of_convolutions_too() -> None:
    nodes = [
        node("Conv", ["x", "w1"], ["a"], "first"),
        node("Conv", ["a", "w2"], ["b"], "second"),
        node("Relu", ["b"], ["c"], "relu"),
        node("Add", ["b", "c"], ["y"], "sum"),
    ]
    model = graph_of(nodes, {"w1": random(8, 3, 3, 3), "w2": random(8, 8, 1, 1)}, ["batch", 3, 8, 8])
    ranges = calibrate(model, [random(4, 3, 8, 8)], quiet=True)
    quantized = {
        rest: [
            own.input[0]
            for own in convert(model, "int8", ranges=ranges, base_precision=rest).model.graph.node
            if own.op_type == "QuantizeLinear"
        ]
        for rest in ("fp16", "fp32")
    }
    assert quantized["fp32"] == ["a", "b"]  # the image itself stays
    assert len(quantized["fp16"]) == 2


def test_kept_layers_stay_out() -> None:
    original, batch = foreign_model(), random(3, 7, 8)
    ranges = calibrate(original, [batch], quiet=True)
    every = convert(original, "int8", ranges=ranges).quantized
    converted = convert(original, "int8", ranges=ranges, keep=every[1:])
    assert (converted.quantized, converted.kept) == (every[:1], every[1:])
    assert sum(own.op_type == "QuantizeLinear" for own in converted.model.graph.node) == 1
    none = convert(original, "int8", ranges=ranges, keep=every)
    assert none.quantized == ()


def test_nothing_to_quantize_is_said() -> None:
    model = graph_of([node("Relu", ["x"], ["y"], "relu")], {}, ["batch", 4])
    with pytest.raises(UserError, match="nothing to quantize"):
        calibrate(model, [random(2, 4)], quiet=True)
    with pytest.raises(UserError, match="nothing to quantize"):
        convert(model, "int8", ranges=Ranges({}, 1, ""))


def test_ranges_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="no range is known for"):
        convert(foreign_model(), "int8", ranges=Ranges({}, 1, ""))


def test_convert_knows_its_precisions() -> None:
    model = foreign_model()
    assert convert(model, "fp32").model is model
    with pytest.raises(UserError, match="did you mean fp16"):
        convert(model, "fp12x16")
    with pytest.raises(UserError, match="Calibrate"):
        convert(model, "int8")
