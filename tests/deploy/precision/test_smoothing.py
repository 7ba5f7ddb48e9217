"""SmoothQuant: the fold changes nothing in fp32 and saves int8 from outliers."""

from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.precision import with_outliers
from tests.deploy.conftest import Exported
from tests.deploy.precision.graphs import graph_of, run, sqnr
from upvits.deploy.precision import calibrate, convert
from upvits.deploy.precision.quantize import quantize
from upvits.deploy.precision.smoothing import fold_outliers
from upvits.deploy.precision.weight_layers import prepared, weight_layers

node = onnx.helper.make_node


@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_the_fold_changes_nothing_in_fp32(name: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    images = exported.images.numpy()
    model = prepared(with_outliers(onnx.load(exported.report.path)))
    ranges = calibrate(model, [images], quiet=True)
    folded, folded_ranges, norms = fold_outliers(model, ranges)
    onnx.checker.check_model(folded, full_check=True)
    # All of the ViT's. PVTv2's patch embeddings end with norms that a residual reads: the first, and three more.
    total = sum(own.op_type == "LayerNormalization" for own in model.graph.node)
    assert total - len(norms) == {"vit": 0, "pvt": 4}[name]
    assert sqnr(run(model, images), run(folded, images)) > 100.0
    measured = calibrate(folded, [images], quiet=True)
    for tensor, amax in folded_ranges.amax.items():
        np.testing.assert_allclose(amax, measured.amax[tensor], rtol=1e-3, atol=1e-5)
    spread = [max(r.amax[t].max() / np.median(r.amax[t]) for t in r.amax) for r in (ranges, measured)]
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_outliers_cost_int8_nothing_after_the_fold(name: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    images = exported.images.numpy()
    model = prepared(with_outliers(onnx.load(exported.report.path)))
    reference, ranges = run(model, images), calibrate(model, [images], quiet=True)
    without = sqnr(reference, run(quantize(model, ranges, "int8", weight_layers(model)), images))
    folded = sqnr(reference, run(convert(model, "int8", ranges=ranges, base_precision="fp32").model, images))
    assert folded > 27.0
    assert folded > without + 10.0


def test_a_norm_that_something_else_reads_is_left_alone() -> None:
    weights: dict[str, np.ndarray[Any, Any]] = {
        "gain": np.linspace(1, 50, 4, dtype=np.float32),
        "w": np.eye(4, dtype=np.float32),
        "two": np.array(2, np.float32),
    }
    nodes = [
        node("LayerNormalization", ["x", "gain"], ["n1"], "alone"),
        node("MatMul", ["n1", "w"], ["a"], "a"),
        node("LayerNormalization", ["a", "gain"], ["n2"], "shared"),
        node("MatMul", ["n2", "w"], ["b"], "b"),
        node("Mul", ["n2", "two"], ["c"], "twice"),
        node("Add", ["b", "c"], ["y"], "sum"),
    ]
    model = prepared(graph_of(nodes, weights, ["batch", 3, 4]))
    images = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    folded, _, norms = fold_outliers(model, calibrate(model, [images], quiet=True))
    assert norms == ("alone",)  # its gain and its reader's weight are shared, and the other users keep theirs
    np.testing.assert_allclose(run(folded, images), run(model, images), rtol=1e-5)


@pytest.mark.parametrize("kept", [True, False], ids=["channels kept", "channels broken up"])
def test_channels_are_followed_through_reshapes(kept: bool) -> None:
    shape = [0, 4, 2, 3] if kept else [0, 2, 2, 6]
    weights: dict[str, np.ndarray[Any, Any]] = {
        "gain": np.array([1, 80, 1, 2], np.float32),
        "shape": np.array(shape, np.int64),
        "w": np.random.default_rng(1).normal(size=(5, shape[1], 1, 1)).astype(np.float32),
    }
    nodes = [
        node("LayerNormalization", ["x", "gain"], ["n"], "norm"),
        node("Transpose", ["n"], ["t"], "first", perm=[0, 2, 1]),
        node("Reshape", ["t", "shape"], ["image"], "image"),
        node("Conv", ["image", "w"], ["y"], "conv"),
    ]
    model = prepared(graph_of(nodes, weights, ["batch", 6, 4]))
    images = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    folded, _, norms = fold_outliers(model, calibrate(model, [images], quiet=True))
    assert norms == (("norm",) if kept else ())
    np.testing.assert_allclose(run(folded, images), run(model, images), rtol=1e-4, atol=1e-5)
