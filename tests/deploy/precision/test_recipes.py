"""The default recipes on the trained demo network and in TensorRT-RTX engines."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from benchmarks.precision import with_outliers
from tests.deploy.conftest import Exported
from tests.deploy.precision.graphs import Array, run, sqnr
from upvits import toolchain
from upvits.calib_data import batches, open_data, proxy_images
from upvits.deploy.choices import BatchProfile
from upvits.deploy.precision import Ranges, calibrate, convert, for_cpu
from upvits.deploy.runtimes.interface import BuildOptions
from upvits.deploy.runtimes.plan_text import read_plan
from upvits.deploy.runtimes.tensorrt_rtx import TENSORRT_RTX


@pytest.fixture(scope="module")
def demo(demo_graph: Path) -> onnx.ModelProto:
    return onnx.load(demo_graph)


@pytest.fixture(scope="module")
def images() -> tuple[Array, Array, Array]:
    """Calibration images, others to evaluate on, and their labels."""
    preprocess = toolchain.preprocess_of(toolchain.create_model("pvt_v2_b0", weights="demo"))
    source = open_data("demo")
    held_out = list(batches(source.val, preprocess, 64))[::5]
    labels = torch.cat([own for _, own in held_out]).numpy()
    calibration = proxy_images(source, preprocess, 128, 0).read().numpy()
    return calibration, torch.cat([own for own, _ in held_out]).numpy(), labels


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "planted outliers"])
def test_the_demo_network_keeps_its_accuracy_in_int8(
    outliers: bool, demo: onnx.ModelProto, images: tuple[Array, Array, Array]
) -> None:
    calibration, held_out, labels = images
    model = with_outliers(demo) if outliers else demo
    reference = run(demo, held_out)
    right = (reference.argmax(1) == labels).mean()
    assert right > 0.95
    ranges = calibrate(model, np.split(calibration, 4), quiet=True)
    for rest in ("fp32",) if outliers else ("fp32", "fp16"):
        converted = convert(model, "int8", ranges=ranges, base_precision=rest)
        assert len(converted.quantized) == (58 if rest == "fp32" else 59)
        outputs = run(for_cpu(converted.model), held_out)
        assert sqnr(reference, outputs) > 33.0
        assert right - (outputs.argmax(1) == labels).mean() <= 0.005


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_every_quantized_layer_is_one_in_the_engine(
    name: str, precision: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if TENSORRT_RTX.missing_to_build() is not None:
        pytest.skip("tensorrt-rtx is not installed")
    exported: Exported = request.getfixturevalue(name)
    model = onnx.load(exported.report.path)
    ranges: Ranges = calibrate(model, [exported.images.numpy()], quiet=True)
    converted = convert(model, precision, ranges=ranges)
    onnx.save(converted.model, tmp_path / "model.onnx")
    options = BuildOptions(precision=precision, batch=BatchProfile(1, 2, 4), targets=("sm89",))
    engine = TENSORRT_RTX.build(tmp_path / "model.onnx", tmp_path / "engine", options)
    compiled = read_plan(engine.path.read_bytes())
    assert compiled is not None
    assert {compiled.products.get(node) for node in converted.quantized} == {precision}
