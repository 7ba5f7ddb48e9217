"""OpenVINO: against ONNX Runtime, in every precision that this CPU has."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.deploy.conftest import Exported
from tests.deploy.runtimes.foreign import FLOAT, computed, decibel, finish, pictures_of, quantized, two_inputs
from upvits.calib_data.errors import GateError, UserError
from upvits.calib_data.installation import install_line
from upvits.deploy.precision.half import to_half
from upvits.deploy.runtimes import BatchProfile, BuildOptions, RunOptions, open_onnx, openvino_
from upvits.deploy.runtimes.openvino_ import OPENVINO, OPENVINO_GPU, widened

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_, "usable_cores", lambda: 1)


def half(exported: Exported, folder: Path, precision: str) -> Path:
    model = onnx.load(exported.report.path)
    path = folder / f"{precision}.onnx"
    onnx.save(model if precision == "fp32" else to_half(model, precision), path)
    return path


@needs_openvino
@pytest.mark.parametrize("name", ["vit", "pvt"])
@pytest.mark.parametrize(("precision", "least"), [("fp32", 90), ("bf16", 25), ("fp16", 45)])
def test_it_computes_what_onnx_runtime_computes(
    name: str, precision: str, least: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if precision not in OPENVINO.precisions:
        pytest.skip(f"this CPU does not compute in {precision}")
    exported: Exported = request.getfixturevalue(name)
    images = {"images": exported.images.numpy()}
    engine = OPENVINO.build(half(exported, tmp_path, precision), tmp_path / "engine", BuildOptions(precision))
    with open_onnx(exported.report.path, threads=1) as reference, OPENVINO.open(engine.folder) as session:
        wanted, got = reference.run(images)["logits"], session.run(images)["logits"]
        assert got.dtype == np.float32
        quality = decibel(wanted, got)
        assert quality > least
        assert precision == "fp32" or quality < 90  # it is not fp32 under another name
        assert session.run({"images": images["images"][:1]})["logits"].shape == (1, 7)
    built = engine.built
    assert built is not None
    assert built.gemms == built.planned
    assert set(built.gemms) == {precision}
    assert built.attention_blocks == (2 if name == "vit" else 4)


@needs_openvino
def test_int8_runs_in_int8_and_is_right(tmp_path: Path) -> None:
    if "int8" not in OPENVINO.precisions:
        pytest.skip("this CPU does not compute in int8")
    model, exact = quantized()
    onnx.save(model, tmp_path / "model.onnx")
    options = BuildOptions("int8", BatchProfile(1, 2, 4))
    engine = OPENVINO.build(tmp_path / "model.onnx", tmp_path / "engine", options)
    assert engine.built is not None
    assert engine.built.gemms == {"int8": 2}
    with OPENVINO.open(engine.folder) as session:
        assert 30 < decibel(exact, session.run({"x": pictures_of(2)})["y"]) < 60


@needs_openvino
@pytest.mark.parametrize("size", [4, 8])
def test_int8_convolutions_are_right_whatever_their_size(size: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    weights: dict[str, Any] = {
        "scale": np.array(4 / 127, np.float32),
        "zero": np.array(0, np.int8),
        "k_q": rng.integers(-127, 128, (32, 32, size, size), np.int8),
    }
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize"),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "dequantize"),
        onnx.helper.make_node("DequantizeLinear", ["k_q", "scale", "zero"], ["k"], "kernel"),
        onnx.helper.make_node("Conv", ["dq", "k"], ["y"], "conv", strides=[size, size]),
    ]
    value = onnx.helper.make_tensor_value_info
    shapes = [value("x", FLOAT, ["n", 32, 16, 16])], [value("y", FLOAT, ["n", 32, 16 // size, 16 // size])]
    model = finish(nodes, *shapes, weights)
    onnx.save(model, tmp_path / "model.onnx")
    engine = OPENVINO.build(tmp_path / "model.onnx", tmp_path / "engine", BuildOptions("int8", BatchProfile(1, 2, 4)))
    x = rng.normal(size=(2, 32, 16, 16)).astype(np.float32)
    with OPENVINO.open(engine.folder) as session:
        assert decibel(computed(model, {"x": x})[0], session.run({"x": x})["y"]) > 30
    assert engine.built is not None
    assert engine.built.gemms == engine.built.planned == {"fp32": 1}


@needs_openvino
def test_a_foreign_model_with_dynamic_sizes_and_two_inputs(tmp_path: Path) -> None:
    onnx.save(two_inputs(), tmp_path / "model.onnx")
    engine = OPENVINO.build(tmp_path / "model.onnx", tmp_path / "engine", BuildOptions())
    with open_onnx(tmp_path / "model.onnx", threads=1) as reference, OPENVINO.open(engine.folder) as session:
        for count, height in ((1, 8), (3, 13)):
            feeds = {
                "picture": np.full((count, 3, height, 9), 0.5, np.float32),
                "vector": np.ones((count, 4), np.float32),
            }
            wanted, got = reference.run(feeds), session.run(feeds)
            assert set(got) == {"scores", "shares"}
            for name in wanted:
                np.testing.assert_allclose(got[name], wanted[name], atol=1e-4)


@needs_openvino
def test_calls_and_layers_are_timed(vit: Exported, tmp_path: Path) -> None:
    engine = OPENVINO.build(vit.report.path, tmp_path / "engine", BuildOptions(require_fused_attention=False))
    assert engine.settings == {"device": "CPU", "inference_precision": "f32", "threads": 1}
    feeds = {"images": vit.images.numpy()}
    with OPENVINO.open(engine.folder, RunOptions(threads=2)) as session:
        assert session.settings["intra_op_threads"] == 2
        times = session.time(feeds, 6)
        assert times.total.shape == (6,)
        assert (times.total > 0).all()
        layers = session.layer_times(feeds, 3)
        before = session.run(feeds)["logits"]
        assert session.run({"images": feeds["images"] * 0})["logits"].shape == before.shape
        assert not np.shares_memory(before, session.run(feeds)["logits"])
        np.testing.assert_array_equal(session.run(feeds)["logits"], before)
    products = [layer for layer in layers if layer.op in ("FullyConnected", "Convolution")]
    assert len(products) == 10
    assert {layer.precision for layer in products} == {"fp32"}
    nodes = {name for node in onnx.load(vit.report.path).graph.node for name in (node.name, *node.output)}
    assert all(nodes & set(layer.name.replace("/WithoutBiases", "").split(",")) for layer in products)
    assert not {layer.op for layer in layers} & {"Const", "Parameter", "Result"}
    with pytest.raises(ValueError, match="closed"):
        session.run(feeds)


def test_half_precision_is_written_back_with_its_rounded_weights(vit: Exported, tmp_path: Path) -> None:
    narrow = onnx.load(half(vit, tmp_path, "bf16"))
    wide = widened(narrow)
    onnx.checker.check_model(wide, full_check=True)
    assert not any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in wide.graph.initializer)
    assert "Cast" in {node.op_type for node in narrow.graph.node}
    assert [list(node.output) for node in wide.graph.node if node.op_type == "Cast"] == [["logits"]]
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in wide.graph.initializer}
    for tensor in narrow.graph.initializer:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            np.testing.assert_array_equal(weights[tensor.name], onnx.numpy_helper.to_array(tensor).astype(np.float32))
    full = onnx.load(vit.report.path)
    assert widened(full) is full
    onnx.save(wide, tmp_path / "wide.onnx")
    feeds = {"images": vit.images.numpy()}
    with open_onnx(vit.report.path, threads=1) as one, open_onnx(tmp_path / "wide.onnx", threads=1) as other:
        assert 30 < decibel(one.run(feeds)["logits"], other.run(feeds)["logits"]) < 90


@needs_openvino
def test_a_precision_that_the_device_lacks_is_refused_before_the_build(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a build was tried")

    engine = OPENVINO.build(vit.report.path, tmp_path / "built", BuildOptions())
    monkeypatch.setattr(openvino_, "_capabilities", lambda device: ("FP16", "INT8", "BIN"))
    monkeypatch.setattr(openvino_, "_compile", fail)
    assert OPENVINO.precisions == ("fp16", "int8")
    with pytest.raises(UserError, match="Precisions of openvino: fp16, int8"):
        OPENVINO.build(vit.report.path, tmp_path / "engine", BuildOptions("bf16"))
    with pytest.raises(UserError, match="computes in fp32"):
        OPENVINO.open(engine.folder)


@needs_openvino
def test_a_layer_that_would_run_wider_than_asked_is_an_error(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "bf16" not in OPENVINO.precisions:
        pytest.skip("this CPU does not compute in bf16")
    monkeypatch.setitem(openvino_._HINTS, "bf16", "f32")
    with pytest.raises(GateError, match="0 of 10 bf16 layers"):
        OPENVINO.build(half(vit, tmp_path, "bf16"), tmp_path / "engine", BuildOptions("bf16"))
    assert not (tmp_path / "engine").exists()


@needs_openvino
def test_what_a_call_fails_with_is_a_message(vit: Exported, tmp_path: Path) -> None:
    engine = OPENVINO.build(vit.report.path, tmp_path / "engine", BuildOptions())
    wrong = {"images": np.zeros((1, 3, 33, 32), np.float32)}
    with OPENVINO.open(engine.folder) as session:
        for call in (lambda: session.run(wrong), lambda: session.time(wrong, 1)):
            with pytest.raises(UserError, match="cannot run this model on these inputs"):
                call()


@needs_openvino
def test_inputs_in_half_precision_are_taken_as_the_file_has_them(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    half = onnx.TensorProto.FLOAT16
    weights = {"w": np.eye(8, dtype=np.float16)}
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    onnx.save(finish([node], [value("x", half, ["n", 8])], [value("y", half, ["n", 8])], weights), tmp_path / "m.onnx")
    engine = OPENVINO.build(tmp_path / "m.onnx", tmp_path / "engine", BuildOptions())
    x = np.arange(16, dtype=np.float16).reshape(2, 8)
    with OPENVINO.open(engine.folder) as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], x)
        assert session.time({"x": x}, 2).total.shape == (2,)
        assert session.layer_times({"x": x}, 1)


@needs_openvino
def test_a_device_that_is_not_there_is_named() -> None:
    if any(device.startswith("GPU") for device in openvino_._core().available_devices):
        pytest.skip("this machine has an Intel GPU")
    missing = OPENVINO_GPU.missing_to_build()
    assert missing is not None
    assert "no GPU here, only CPU" in missing.why


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = OPENVINO.missing_to_build()
    assert missing is not None
    assert missing.fix == install_line("openvino")
    assert "int8" in OPENVINO.precisions


@needs_openvino
def test_nothing_is_reported_to_its_maker(tmp_path: Path) -> None:
    code = (
        "import sys; from upvits.deploy.runtimes import openvino_; openvino_._core(); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
    assert list(tmp_path.rglob("*")) == []
