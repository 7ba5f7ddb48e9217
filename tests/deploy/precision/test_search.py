"""Which layers lose most, and putting them back."""

import numpy as np
import onnx
import pytest

from tests.deploy.conftest import Exported
from tests.deploy.precision.graphs import Array, graph_of, run, sqnr
from upvits.calib_data.errors import UserError
from upvits.deploy.precision import Converted, calibrate, convert, for_cpu, layer_sqnr, put_back
from upvits.deploy.precision.quantize import activation_scale, quantized_weight

node = onnx.helper.make_node


def chain(layers: int, outlier: int | None = None) -> onnx.ModelProto:
    """Products with ReLU between them; the weight of one has rows of very different size."""
    random = np.random.default_rng(0)
    weights, nodes, last = {}, [], "x"
    for index in range(layers):
        weight = random.normal(size=(8, 8)).astype(np.float32)
        if index == outlier:
            weight[0] *= 200.0
        weights[f"w{index}"] = weight
        nodes.append(node("MatMul", [last, f"w{index}"], [f"m{index}"], f"product{index}"))
        last = "y" if index == layers - 1 else f"r{index}"
        nodes.append(node("Relu", [f"m{index}"], [last], f"relu{index}"))
    return graph_of(nodes, weights, ["batch", 8])


def rows(count: int = 64) -> Array:
    return np.random.default_rng(1).normal(size=(count, 8)).astype(np.float32)


def test_the_error_is_that_of_the_layer_alone() -> None:
    model, batch = chain(1), rows()
    converted = convert(model, "int8", ranges=calibrate(model, [batch], quiet=True), base_precision="fp32")
    assert converted.ranges is not None
    scale = float(activation_scale(converted.ranges, "x", "int8"))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    values, scales = quantized_weight(weight, "int8", 1)
    expected = (np.clip(np.rint(batch / scale), -127, 127) * scale) @ (values * scales)
    found = layer_sqnr(model, converted, np.split(batch, 4), quiet=True)
    assert found == {"product0": pytest.approx(sqnr(batch @ weight, expected), abs=0.01)}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_every_layer_of_a_network_worst_first(precision: str, pvt: Exported) -> None:
    model, images = onnx.load(pvt.report.path), pvt.images.numpy()
    ranges = calibrate(model, [images], quiet=True)
    converted = convert(model, precision, ranges=ranges)
    found = layer_sqnr(model, converted, [images], quiet=True)
    quantized = convert(model, "int8", ranges=ranges).quantized
    assert set(found) == set(converted.quantized or quantized)
    assert list(found.values()) == sorted(found.values())
    low, high = {"fp16": (55, 85), "bf16": (40, 65), "int8": (18, 60), "fp8": (20, 40)}[precision]
    assert low < min(found.values()) <= max(found.values()) < high


def test_the_layer_with_outliers_is_the_worst() -> None:
    model, batch = chain(5, outlier=2), rows()
    converted = convert(model, "int8", ranges=calibrate(model, [batch], quiet=True), base_precision="fp32")
    found = layer_sqnr(model, converted, [batch], quiet=True)
    assert next(iter(found)) in ("product2", "product3")  # the weight itself, or what follows from it
    with pytest.raises(UserError, match="no images"):
        layer_sqnr(model, converted, [], quiet=True)


def test_the_smallest_set_that_holds_is_found() -> None:
    model, batch = chain(9), rows()
    ranges = calibrate(model, [batch], quiet=True)
    order = [f"product{index}" for index in (4, 7, 1, 0, 8, 3, 2, 6, 5)]
    judged: list[int] = []

    def holds(converted: Converted) -> bool:
        judged.append(len(converted.kept))
        return {"product4", "product0", "product3"} <= set(converted.kept)

    found = put_back(model, ranges, "int8", "fp32", order, holds)
    assert found.holds
    assert found.layers == tuple(order[:6])
    assert set(found.converted.kept) == set(order[:6])
    assert judged == [0, 1, 2, 4, 8, 6, 5]
    assert found.tried == len(judged)


def test_nothing_is_put_back_when_it_holds_and_all_when_it_never_does() -> None:
    model, batch = chain(3), rows()
    ranges = calibrate(model, [batch], quiet=True)
    order = ["product0", "product1", "product2"]
    assert put_back(model, ranges, "int8", "fp32", order, lambda one: True).layers == ()
    never = put_back(model, ranges, "int8", "fp32", order, lambda one: False)
    assert (never.holds, never.layers, never.converted.quantized) == (False, tuple(order), ())
    np.testing.assert_array_equal(run(for_cpu(never.converted.model), batch), run(model, batch))
