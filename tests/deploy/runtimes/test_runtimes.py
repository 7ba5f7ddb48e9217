"""Choosing runtimes, and what is special to each of them."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import upvits.deploy.runtimes.tensorrt_rtx
from tests.deploy.conftest import Exported
from upvits.calib_data.errors import BuildError, MissingDependencyError, UserError
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.precision import convert
from upvits.deploy.runtimes import (
    RUNTIMES,
    BatchProfile,
    BuildOptions,
    open_onnx,
    resolve_runtimes,
    runtime_named,
)
from upvits.deploy.runtimes.onnxruntime_ import CPU, CUDA
from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession
from upvits.deploy.runtimes.tensorrt_rtx import DEFAULT_TARGETS, TENSORRT_RTX


def test_auto_takes_what_can_be_built_and_says_why_not_the_rest() -> None:
    choice = resolve_runtimes("auto")
    taken = [runtime.name for runtime in choice.runtimes]
    assert taken[0] == "onnxruntime"
    assert sorted(taken + [left.name for left in choice.left_out]) == sorted(RUNTIMES)
    assert all(runtime.missing_to_build() is None for runtime in choice.runtimes)
    assert all(left.why and left.fix for left in choice.left_out)


def test_names_are_taken_in_their_order_once() -> None:
    assert [runtime.name for runtime in resolve_runtimes("onnxruntime, onnxruntime").runtimes] == ["onnxruntime"]
    assert resolve_runtimes("onnxruntime").left_out == ()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("onnxruntim", "did you mean onnxruntime"),
        ("onnxruntime,tensort-rtx", "did you mean tensorrt-rtx"),
        ("", "no runtime was named"),
        ("caffe", "Runtimes: onnxruntime"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve_runtimes(spec)


def test_a_runtime_asked_for_by_name_is_not_left_out_silently() -> None:
    missing = next((runtime for runtime in RUNTIMES.values() if runtime.missing_to_build() is not None), None)
    if missing is None:
        pytest.skip("this machine has every runtime")
    with pytest.raises(MissingDependencyError, match=f"{missing.name} cannot build"):
        resolve_runtimes(f"onnxruntime,{missing.name}")


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_batch_profiles_are_in_order(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="not in order"):
        BatchProfile(*sizes)


@pytest.mark.parametrize(
    ("name", "library"), [("onnxruntime", "onnxruntime"), ("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")]
)
def test_a_library_that_is_not_installed_is_named_with_its_install_command(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    missing = RUNTIMES[name].missing_to_build()
    assert missing is not None
    assert "not installed" in missing.why
    assert "pip install" in missing.fix
    assert name in [left.name for left in resolve_runtimes("auto").left_out]


def test_the_cpu_session_uses_the_cores_it_may_and_does_not_spin(vit: Exported) -> None:
    with open_onnx(vit.report.path) as session:
        assert session.settings["intra_op_threads"] == usable_cores()
        assert session.settings["spinning"] is False
    with open_onnx(vit.report.path, threads=1) as session:
        assert session.settings["intra_op_threads"] == 1


def test_an_engine_runs_with_the_threads_that_it_was_tuned_to(vit: Exported, tmp_path: Path) -> None:
    engine = CPU.build(vit.report.path, tmp_path / "engine", BuildOptions())
    with CPU.open(tmp_path / "engine") as session:
        assert session.settings["intra_op_threads"] == engine.settings["intra_op_threads"]
    assert 1 <= int(engine.settings["intra_op_threads"]) <= usable_cores()


@pytest.mark.skipif(CUDA.missing_to_run() is None, reason="the CUDA provider works here")
def test_a_provider_that_does_not_work_is_an_error_not_a_fallback(
    vit: Exported, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((MissingDependencyError, ValueError)):
        OnnxRuntimeSession(vit.report.path.read_bytes(), "CUDAExecutionProvider")
    assert capfd.readouterr().err == ""


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_builds_the_graph_as_it_is_for_all_targets_in_one_file(
    precision: str, vit: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx.save(convert(onnx.load(vit.report.path), precision).model, tmp_path / "model.onnx")
    capfd.readouterr()
    options = BuildOptions(precision, BatchProfile(1, 2, 4), workspace_mib=512)
    engine = TENSORRT_RTX.build(tmp_path / "model.onnx", tmp_path / "engine", options)
    assert engine.targets[:3] == DEFAULT_TARGETS == ("sm86", "sm89", "sm120")
    assert engine.settings["tf32"] is False
    assert engine.built is not None
    assert set(engine.built.gemms) == {precision}
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("rtx")
def test_rtx_targets(vit: Exported, tmp_path: Path) -> None:
    engine = TENSORRT_RTX.build(vit.report.path, tmp_path / "engine", BuildOptions(targets=("SM89",)))
    assert engine.targets == ("sm89",)
    assert json.loads((tmp_path / "engine/build.json").read_text())["targets"] == ["sm89"]
    for wrong, said in (("sm98", "did you mean sm8"), ("sm90", "data centre"), ("NONE", "Targets: ")):
        with pytest.raises(UserError, match=said):
            TENSORRT_RTX.build(vit.report.path, tmp_path / "other", BuildOptions(targets=(wrong,)))
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("rtx")
def test_rtx_default_targets_include_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx as trt

    for capability, extra in (((12, 1), ("sm121",)), ((8, 9), ()), ((9, 0), ()), (None, ())):
        monkeypatch.setattr(upvits.deploy.runtimes.tensorrt_rtx, "compute_capability", lambda found=capability: found)
        assert upvits.deploy.runtimes.tensorrt_rtx._default_targets(trt) == DEFAULT_TARGETS + extra


@pytest.mark.usefixtures("rtx")
def test_rtx_names_the_node_that_parses_but_cannot_be_built(tmp_path: Path) -> None:
    value, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    constants = {"most": np.array([3]), "overlap": np.array([0.5], np.float32), "score": np.array([0.1], np.float32)}
    names = ["boxes", "scores", *constants]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("NonMaxSuppression", names, ["kept"], "suppression")],
        "nms",
        [value("boxes", float32, ["batch", 10, 4]), value("scores", float32, ["batch", 1, 10])],
        [value("kept", onnx.TensorProto.INT64, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = tmp_path / "nms.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(BuildError, match=r"node suppression \(NonMaxSuppression\)"):
        TENSORRT_RTX.build(path, tmp_path / "engine", BuildOptions())
    assert not (tmp_path / "engine").exists()


def test_runtimes_are_found_by_name() -> None:
    assert runtime_named("tensorrt-rtx") is TENSORRT_RTX
