"""ONNX files from strangers: each ends in one message, and none runs for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.robustness.graphs import endless, model_of, node, references, structures, value
from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.files import load_model
from upvits.deploy.graphs.nodes import circle_of, endless_loops
from upvits.deploy.measure.inputs import inputs_of
from upvits.deploy.runtimes import onnxruntime_session
from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession

ENDLESS = endless()["a Loop without end"]


@pytest.mark.parametrize("what", sorted({*references()} - {"weights in 'm.onnx'"}))  # the file's own bytes are bytes
def test_weights_elsewhere_are_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "m.onnx").write_bytes(references()[what])
    with pytest.raises(UserError):
        load_model(tmp_path / "m.onnx")


def test_a_function_that_calls_itself_is_left_to_the_runtime(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(structures()["a function that calls itself"])
    assert load_model(tmp_path / "m.onnx").graph.node


@pytest.mark.parametrize("given", [value("x", ["N", -4]), value("x", ["N"], 99)], ids=["-4 wide", "type 99"])
def test_inputs_of_no_size_or_type_are_refused(given: onnx.ValueInfoProto) -> None:
    with pytest.raises(UserError, match="x"):
        inputs_of(model_of(inputs=[given]), "m")


def test_a_loop_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_session, "_LONGEST_CALL", 0.3)
    feeds = {"x": np.zeros((1, 4), np.float32)}
    with OnnxRuntimeSession(ENDLESS, threads=1) as session:
        for call in (session.run, lambda given: session.time(given, 1)):
            with pytest.raises(UserError, match="did not end"):
                call(feeds)


def test_loops_are_told_by_their_rounds() -> None:
    assert endless_loops(onnx.load_model_from_string(ENDLESS)) == ("y",)
    short = onnx.load_model_from_string(ENDLESS)
    short.graph.initializer[0].CopyFrom(helper.make_tensor("m", TensorProto.INT64, [], [10]))
    assert endless_loops(short) == ()
    within = helper.make_graph(onnx.load_model_from_string(ENDLESS).graph.node, "g", [], [value("y", None)])
    assert endless_loops(model_of([node("If", "x", "z", then_branch=within)])) == ("y",)
    assert endless_loops(model_of()) == ()


def test_tensors_that_need_each_other_are_refused(tmp_path: Path) -> None:
    circle = [node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "a", "y")]
    branch = helper.make_graph([node("Relu", "y", "inner")], "branch", [], [value("inner", None)])
    for nodes in (circle, [node("Add", "x y", "y")], [node("If", "x", "y", then_branch=branch)]):
        path = tmp_path / "model.onnx"
        path.write_bytes(model_of(nodes).SerializeToString())
        with pytest.raises(UserError, match="need each other"):
            load_model(path)
    unsorted = [node("Relu", "a", "y"), node("Relu", "x", "a")]
    assert circle_of(model_of(unsorted)) == circle_of(model_of()) == ()


def test_openvino_takes_no_loop_that_it_cannot_stop() -> None:
    pytest.importorskip("openvino")
    from upvits.deploy.runtimes.openvino_ import OpenVinoSession

    with pytest.raises(RuntimeError, match="need not end"):
        OpenVinoSession(ENDLESS, "CPU", "f32", 1)
