"""On which provider graphs are calibrated and judged; no GPU is needed to tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from upvits.deploy.precision import calibrate
from upvits.deploy.runtimes import onnxruntime_ as module
from upvits.deploy.runtimes.interface import Missing
from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession, load_errors


def _doubled() -> ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Provider and options of every session that was asked for; all of them run on the CPU."""
    found: list[tuple[str, Any]] = []

    def make(model: Any, provider: str = "CPUExecutionProvider", **options: Any) -> OnnxRuntimeSession:
        found.append((provider, options["provider_options"]))
        return OnnxRuntimeSession(model)

    monkeypatch.setattr(module, "OnnxRuntimeSession", make)
    return found


def _gpu(monkeypatch: pytest.MonkeyPatch, *, works: bool) -> None:
    missing = None if works else Missing("no GPU", "buy one")
    monkeypatch.setattr(module, "_missing_provider", lambda _: missing)
    monkeypatch.setattr(module, "missing_to_run_on_gpu", lambda: missing)


@pytest.mark.parametrize(
    ("works", "provider", "options"),
    [(True, "CUDAExecutionProvider", {"use_tf32": "0"}), (False, "CPUExecutionProvider", {})],
)
def test_a_gpu_judges_where_there_is_one(
    works: bool, provider: str, options: dict[str, str], opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpu(monkeypatch, works=works)
    with module.open_judged(_doubled()) as session:
        assert session.run({"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]
    assert opened == [(provider, options)]
    assert module.where_judged().on_cpu is not works


def test_a_graph_that_the_gpu_refuses_is_judged_on_the_cpu(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, works=True)
    plain: Any = vars(module)["OnnxRuntimeSession"]

    def refuse(model: Any, provider: str = "CPUExecutionProvider", **options: Any) -> Any:
        if provider == "CUDAExecutionProvider":
            raise load_errors()[0]("no kernel image is available")
        return plain(model, provider, **options)

    monkeypatch.setattr(module, "OnnxRuntimeSession", refuse)
    with module.open_judged(_doubled()) as session:
        assert session.run({"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]
    assert opened == [("CPUExecutionProvider", {})]


def test_calibration_runs_there(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, works=True)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 0.0, 0.0, 1.0])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")], "g", values[:1], values[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    ranges = calibrate(model, [np.array([[1.0, -3.0]], np.float32)], quiet=True)
    assert ranges.amax["x"].tolist() == [1.0, 3.0]
    assert opened[0][0] == "CUDAExecutionProvider"
