"""ONNX Runtime: what it really computes in, how it is timed, and foreign models."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.deploy.conftest import Exported
from tests.deploy.runtimes.foreign import FLOAT, computed, decibel, finish, pictures_of, quantized, two_inputs
from upvits.calib_data.errors import BuildError, GateError, UserError
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.runtimes import BatchProfile, BuildOptions, RunOptions, onnxruntime_, open_model, open_onnx, threads
from upvits.deploy.runtimes import onnxruntime_providers as providers
from upvits.deploy.runtimes.interface import Arrays, CallTimes
from upvits.deploy.runtimes.onnxruntime_ import CPU, TENSORRT, TENSORRT_RTX
from upvits.deploy.runtimes.onnxruntime_facts import biases_apart, unsigned_activations
from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession, optimised_graph

X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to tune: builds take no longer than they must."""
    monkeypatch.setattr(onnxruntime_, "usable_cores", lambda: 1)


def lookup() -> onnx.ModelProto:
    """Looks tokens up in a table of one row."""
    node = onnx.helper.make_node("Gather", ["table", "tokens"], ["y"], "gather")
    value = onnx.helper.make_tensor_value_info
    inputs, outputs = [value("tokens", onnx.TensorProto.INT64, ["n", 3])], [value("y", FLOAT, ["n", 3, 4])]
    return finish([node], inputs, outputs, {"table": np.ones((1, 4), np.float32)})


def build(model: onnx.ModelProto, folder: Path, options: BuildOptions) -> Any:
    onnx.save(model, folder / "model.onnx")
    return CPU.build(folder / "model.onnx", folder / "engine", options)


def test_a_foreign_model_with_dynamic_sizes_and_two_inputs_computes_what_the_standard_says(tmp_path: Path) -> None:
    model = two_inputs()
    onnx.save(model, tmp_path / "foreign.onnx")
    rng = np.random.default_rng(0)
    with open_onnx(tmp_path / "foreign.onnx", threads=1) as session:
        assert session.input_names == ("picture", "vector")
        for count, height in ((1, 8), (3, 13)):
            feeds = {
                "picture": rng.normal(size=(count, 3, height, 9)).astype(np.float32),
                "vector": rng.normal(size=(count, 4)).astype(np.float32),
            }
            wanted = dict(zip(session.output_names, computed(model, feeds), strict=True))
            for name, got in session.run(feeds).items():
                np.testing.assert_allclose(got, wanted[name], atol=1e-5)
            assert session.time(feeds, 2).total.shape == (2,)


@pytest.mark.usefixtures("one_core")
def test_int8_runs_in_int8_and_is_right(tmp_path: Path) -> None:
    model, exact = quantized()
    engine = build(model, tmp_path, BuildOptions("int8", BatchProfile(1, 2, 4)))
    assert engine.built is not None
    assert engine.built.planned == {"int8": 2}
    assert engine.built.gemms == {"int8": 2}
    with CPU.open(engine.folder) as session:
        got = session.run({"x": pictures_of(2)})["y"]
    np.testing.assert_allclose(got, computed(model, {"x": pictures_of(2)})[0], atol=1e-3)
    assert 30 < decibel(exact, got) < 60  # int8 rounding: less than none, more than wrong


@pytest.mark.skipif(not X86, reason="about kernels for x86")
def test_unsigned_activations_are_the_same_numbers_and_needed() -> None:
    model, _ = quantized()
    changed = unsigned_activations(model)
    feeds = {"x": pictures_of(3)}
    np.testing.assert_array_equal(computed(model, feeds)[0], computed(changed, feeds)[0])
    counts = [
        [node.op_type for node in optimised_graph(m.SerializeToString()).graph.node].count("MatMulIntegerToFloat")
        for m in (model, changed)
    ]
    assert counts == [0, 2]


def test_a_bias_in_fp32_does_not_keep_a_product_from_int8() -> None:
    rng = np.random.default_rng(6)
    weights: dict[str, Any] = {
        "scale": np.array(0.03, np.float32),
        "zero": np.array(0, np.int8),
        "w_q": rng.integers(-127, 128, (5, 16), np.int8),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        onnx.helper.make_node("DequantizeLinear", ["w_q", "scale", "zero"], ["w"]),
        onnx.helper.make_node("Gemm", ["dq", "w", "bias"], ["y"], "gemm", transB=1),
    ]
    value = onnx.helper.make_tensor_value_info
    model = finish(nodes, [value("x", FLOAT, ["n", 16])], [value("y", FLOAT, ["n", 5])], weights)
    x = {"x": rng.normal(size=(3, 16)).astype(np.float32)}
    changed = biases_apart(model)
    np.testing.assert_allclose(computed(changed, x)[0], computed(model, x)[0], atol=1e-6)
    operators = [node.op_type for node in optimised_graph(changed.SerializeToString()).graph.node]
    assert "QGemm" in operators


@pytest.mark.usefixtures("one_core")
@pytest.mark.skipif(not X86, reason="about kernels for x86")
def test_a_layer_that_would_run_in_fp32_instead_of_int8_is_an_error(tmp_path: Path) -> None:
    model, _ = quantized(convolution=True)
    with pytest.raises(GateError, match="2 of 3 int8 layers"):
        build(model, tmp_path, BuildOptions("int8"))
    assert not (tmp_path / "engine").exists()


@pytest.mark.usefixtures("one_core")
def test_a_graph_of_which_nothing_narrow_is_expected_is_built_as_it_is(tmp_path: Path) -> None:
    model, exact = quantized(convolution=True)
    engine = build(model, tmp_path, BuildOptions("fp32", BatchProfile(1, 2, 4)))
    assert engine.built is not None
    assert engine.built.planned == {"int8": 3}
    with CPU.open(engine.folder) as session:
        assert session.run({"x": pictures_of(2)})["y"].shape == exact.shape


def test_what_a_call_fails_with_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(lookup(), threads=1) as session:
        assert session.run({"tokens": np.zeros((2, 3), np.int64)})["y"].shape == (2, 3, 4)
        wrong = {"tokens": np.ones((2, 3), np.int64)}
        for call in (lambda: session.run(wrong), lambda: session.time(wrong, 2), lambda: session.layer_times(wrong, 1)):
            with pytest.raises(UserError, match="cannot run this model on these inputs") as error:
                call()
            assert "out of data bounds" in error.value.why

        def fail(*arguments: Any) -> None:
            arena = (
                "bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory for requested buffer of size 8388608"
            )
            raise RuntimeError(arena)

        monkeypatch.setattr(session, "_run", fail)
        with pytest.raises(UserError) as error:
            session.run(wrong)
        assert "smaller batches or fewer streams" in error.value.fix


@pytest.mark.usefixtures("one_core")
def test_memory_that_runs_out_while_building_is_named_with_what_helps(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(onnxruntime_, "optimised_graph", fail)
    with pytest.raises(BuildError, match="ran out of memory") as error:
        CPU.build(vit.report.path, tmp_path / "engine", BuildOptions())
    assert "smaller largest batch" in error.value.fix


@pytest.mark.usefixtures("one_core")
def test_the_record_is_written_after_what_the_provider_compiled(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CPU.build(vit.report.path, tmp_path / "engine", BuildOptions()).folder
    seen: list[bool] = []

    def copy(source: Path, target: Path) -> None:
        seen.append((folder / "build.json").exists())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", copy)
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "kernel").touch()
    with pytest.raises(UserError, match="no space left"):
        CPU._save_cache(tmp_path / "compiled", folder)
    assert seen == [False]
    assert not (folder / "build.json").exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_precisions_that_the_cpu_does_not_compute_in_are_refused(vit: Exported, precision: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp32, int8"):
        CPU.build(vit.report.path, tmp_path / "engine", BuildOptions(precision))


@pytest.mark.usefixtures("one_core")
def test_what_was_built_is_recorded_and_unfused_attention_can_be_refused(vit: Exported, tmp_path: Path) -> None:
    built = CPU.build(vit.report.path, tmp_path / "engine", BuildOptions()).built
    assert built is not None
    assert built.gemms == built.planned == {"fp32": 10}  # patches, 2 blocks of 4, head
    assert (built.attention_blocks, built.attention_fused) == (2, 0)
    assert built.casts == 0 < built.reformats < built.layers
    with pytest.raises(GateError, match="0 of 2 attention blocks"):
        CPU.build(vit.report.path, tmp_path / "other", BuildOptions(require_fused_attention=True))


def test_calls_are_timed_in_bound_buffers_and_layers_by_the_profiler(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    images = vit.images.numpy()
    with open_onnx(vit.report.path, threads=1) as session:
        wanted = session.run({"images": images})["logits"]
        times = session.time({"images": images}, 7)
        assert times.total.shape == (7,)
        assert (times.total > 0).all()
        assert times.h2d is None
        assert times.compute is None
        session.time({"images": images * 0}, 1)  # same shapes, other numbers
        np.testing.assert_array_equal(session._bound({"images": images}).call({"images": images})["logits"], wanted)
        layers = session.layer_times({"images": images}, 5)
        np.testing.assert_array_equal(session.run({"images": images})["logits"], wanted)
    assert sum(layer.op in ("MatMul", "Gemm", "Conv", "FusedMatMul") for layer in layers) == 10 + 4
    assert {layer.precision for layer in layers if layer.op == "MatMul"} == {"fp32"}
    patches = next(layer for layer in layers if layer.op == "Conv")
    assert patches.bytes is not None
    assert patches.bytes >= images.nbytes
    assert 0 < sum(layer.ms for layer in layers) / 1e3 < 100 * times.total.max()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        session.time({"images": images}, 1)


def test_bound_outputs_hold_the_answer_after_many_calls_and_other_shapes(vit: Exported) -> None:
    # ONNX Runtime 1.23 (Python 3.10): the handles of `get_outputs` dangle after `clear_binding_outputs`, a crash
    images = vit.images.numpy()
    with open_onnx(vit.report.path, threads=1) as session:
        for size in (4, 1, 4):
            wanted = session.run({"images": images[:size]})["logits"]
            session.time({"images": images[:size]}, 50)
            feeds = {"images": images[:size]}
            np.testing.assert_array_equal(session._bound(feeds).call(feeds)["logits"], wanted)


@pytest.mark.usefixtures("one_core")
def test_threads_can_be_chosen(vit: Exported, tmp_path: Path) -> None:
    engine = CPU.build(vit.report.path, tmp_path / "engine", BuildOptions())
    assert engine.settings["intra_op_threads"] == 1
    with CPU.open(engine.folder) as session:
        assert session.settings["intra_op_threads"] == 1
    with CPU.open(engine.folder, RunOptions(threads=3)) as session:
        assert session.settings["intra_op_threads"] == 3
    with open_model(onnx.load(vit.report.path)) as session:
        assert session.settings["intra_op_threads"] == usable_cores()
        assert session.settings["spinning"] is False


def test_more_threads_must_pay(vit: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads that are three times as fast win; four that are only twice as fast lose against one."""

    class Fake(OnnxRuntimeSession):
        gain = 0.0

        def time(self, feeds: Arrays, calls: int) -> CallTimes:
            seconds = 0.06 - self.gain * (int(self.settings["intra_op_threads"]) == 4)
            time.sleep(seconds / 10)
            return CallTimes(total=np.full(calls, seconds))

    monkeypatch.setattr(threads, "_TUNING_SECONDS", 0.1)
    model = onnx.load(vit.report.path)
    content, feeds = model.SerializeToString(), threads.random_feeds(model, 2)
    assert feeds is not None
    assert feeds["images"].shape == (2, 3, 32, 32)

    def best(cores: int, feeds: Arrays | None = feeds) -> int:
        return threads.worthwhile_threads(lambda count: Fake(content, threads=count), feeds, cores)

    assert best(4) == 1
    Fake.gain = 0.03
    assert best(4) == 1
    Fake.gain = 0.045
    assert best(4) == 4
    assert best(1) == 1
    assert threads.random_feeds(two_inputs(), 1) is None
    assert best(4, None) == 4


def test_profiles_are_made_of_the_inputs_and_a_dynamic_axis_is_named(vit: Exported) -> None:
    options = BuildOptions("int8", BatchProfile(1, 8, 32), workspace_mib=256)
    settings = providers.build_settings(providers.TENSORRT, onnx.load(vit.report.path), options)
    assert settings["trt_profile_min_shapes"] == "images:1x3x32x32"
    assert settings["trt_profile_opt_shapes"] == "images:8x3x32x32"
    assert settings["trt_profile_max_shapes"] == "images:32x3x32x32"
    assert settings["trt_max_workspace_size"] == str(256 << 20)
    assert settings["trt_int8_enable"] == "1"
    rtx = providers.build_settings(providers.TENSORRT_RTX, onnx.load(vit.report.path), options)
    assert rtx["nv_profile_opt_shapes"] == "images:8x3x32x32"
    assert not any("int8" in name for name in rtx)  # always strongly typed
    with pytest.raises(UserError, match="axis 2 of the input picture is dynamic"):
        providers.build_settings(providers.TENSORRT, two_inputs(), options)


def test_a_tensorrt_of_another_version_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "provider.so"
    library.write_bytes(b"\0libcudart.so.13\0libnvinfer.so.97\0")
    monkeypatch.setattr(providers, "version", lambda name: "11.2.0")
    missing = providers.missing_tensorrt(library)
    assert missing is not None
    assert "TensorRT 97 (libnvinfer.so.97); installed is TensorRT 11.2.0" in missing.why
    assert missing.fix == "pip install 'tensorrt>=97,<98'"
    assert providers.missing_tensorrt(tmp_path / "another_system.dll") is None


@pytest.mark.parametrize(
    ("runtime", "package"), [(TENSORRT, "onnxruntime-gpu"), (TENSORRT_RTX, "onnxruntime-ep-nv-tensorrt-rtx")]
)
def test_a_provider_that_this_build_lacks_is_named_with_its_package(
    runtime: onnxruntime_.OnnxRuntime, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_, "available_providers", lambda: (providers.CPU,))
    monkeypatch.setattr(providers, "RTX_PLUGIN", "no_such_plugin")
    onnxruntime_._missing_provider.cache_clear()
    missing = runtime.missing_to_build()
    onnxruntime_._missing_provider.cache_clear()
    assert missing is not None
    assert "no TensorRT" in missing.why
    assert package in missing.fix


def test_nothing_is_reported_to_its_maker(tmp_path: Path) -> None:
    code = "from upvits.deploy.runtimes import onnxruntime_ as o; o.library_version()"
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(root)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment.pop("XDG_CACHE_HOME", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
    assert list(tmp_path.rglob("*")) == []
