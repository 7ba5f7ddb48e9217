"""bf16 and fp8 graphs on the CPU round as they say."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.deploy.conftest import Exported
from tests.deploy.precision.graphs import Array, graph_of, run, sqnr
from upvits.deploy.precision import calibrate, convert, for_cpu

node = onnx.helper.make_node


def product(weight: Array) -> onnx.ModelProto:
    return graph_of([node("MatMul", ["x", "w"], ["y"], "product")], {"w": weight}, ["batch", 8])


def data() -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    return random.normal(size=(16, 8)).astype(np.float32), random.normal(size=(8, 8)).astype(np.float32)


def test_bf16_rounds_inputs_weights_and_results() -> None:
    x, w = data()

    def bf16(values: Array) -> Array:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    ours = run(for_cpu(convert(product(w), "bf16").model), x)
    exact = bf16(bf16(x) @ bf16(w))
    assert np.abs(bf16(ours) - ours).max() == 0.0
    assert np.mean(ours == exact) > 0.95  # sums in another order may round the other way
    np.testing.assert_allclose(ours, exact, rtol=2**-7)


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_fp8_rounds_inputs_and_weights(rest: str) -> None:
    x, w = data()
    x[0, 0] = 30.0
    model = product(w)
    ranges = calibrate(model, [x[1:]], quiet=True)  # so that the 30 lies outside and has to saturate
    ours = run(for_cpu(convert(model, "fp8", ranges=ranges, base_precision=rest).model), x)

    def fp8(values: Array, amax: Array) -> Array:
        scale = amax / 448
        return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    exact = fp8(x, np.abs(x[1:]).max()) @ fp8(w, np.abs(w).max(axis=0))
    assert sqnr(x[1:] @ w, ours[1:]) < 40.0
    np.testing.assert_allclose(ours, exact, atol=0.25)  # scales are rounded up to fp16
    assert sqnr(exact, ours) > 32.0


def test_int8_and_fp16_run_as_they_are(vit: Exported) -> None:
    model, images = onnx.load(vit.report.path), vit.images.numpy()
    ranges = calibrate(model, [images], quiet=True)
    for precision in ("fp16", "int8"):
        converted = convert(model, precision, ranges=ranges).model
        assert [own.op_type for own in for_cpu(converted).graph.node] == [own.op_type for own in converted.graph.node]


@pytest.mark.parametrize("name", ["vit", "pvt"])
@pytest.mark.parametrize(("precision", "rest"), [("bf16", "fp16"), ("fp8", "fp16"), ("fp8", "fp32")])
def test_networks(name: str, precision: str, rest: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    model, images = onnx.load(exported.report.path), exported.images.numpy()
    ranges = calibrate(model, [images], quiet=True)
    converted = for_cpu(convert(model, precision, ranges=ranges, base_precision=rest).model)
    onnx.checker.check_model(converted, full_check=True)
    assert (32 if precision == "bf16" else 15) < sqnr(run(model, images), run(converted, images)) < 60
