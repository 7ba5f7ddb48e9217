"""Compare: any ONNX file, engine folder or run, measured in turns; what cannot be measured is said, not guessed."""

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from calib_data.errors import MissingDependencyError, UserError
from deploy.measure import compare_targets
from deploy.measure.compare import Comparison, compare, comparison_table
from deploy.measure.compare_targets import Input, find_targets, inputs_of, random_feeds
from deploy.runtimes import BuildOptions, runtime_named

from ..conftest import Exported

FLOAT = np.dtype(np.float32)
ONNXRUNTIME = "onnxruntime"


def matmul(path: Path, shape: Sequence[int | str | None] = ("batch", 64), layers: int = 1) -> Path:
    """A stack of products with a 64 x 64 matrix, with the input shape that is asked for."""
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float32), "weight")
    names = ["x", *(f"h{i}" for i in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "weight"], [b], name=b) for a, b in itertools.pairwise(names)]
    graph = helper.make_graph(
        nodes,
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def two_inputs(path: Path) -> Path:
    """Token numbers that look up rows of a table, times a mask: inputs of two types."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "tokens"], ["rows"]), helper.make_node("Mul", ["rows", "mask"], ["y"])],
        "lookup",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", 6]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, [6, 4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((2, 4), np.float32), "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def measured(*targets: Path, **options: Any) -> Comparison:
    return compare(targets, **{"runtimes": ONNXRUNTIME, "seconds": 0.2, "threads": 1, **options})


def shown(found: Comparison) -> str:
    out = StringIO()
    Console(file=out, width=80, color_system=None).print(comparison_table(found))
    return out.getvalue()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("compare")
    long, short = matmul(folder / "a" / "model.onnx", layers=150), matmul(folder / "b" / "model.onnx")
    return measured(long, short, batches=(1, 16), streams=(1, 2))


def test_models_are_compared_with_the_first(both: Comparison) -> None:
    names = [own.name for own in both.models]
    assert names == ["a/model.onnx onnxruntime fp32", "b/model.onnx onnxruntime fp32"]
    assert both.reference == names[0]
    assert [(own.name, own.batch) for own in both.figures] == [(name, batch) for batch in (1, 16) for name in names]
    first, second = both.figures[:2]
    assert (first.speedup, first.low, first.high) == (1, 1, 1)
    assert second.speedup > 3  # 150 layers against one
    assert second.speedup == pytest.approx(np.median(np.array(first.rounds_ms) / np.array(second.rounds_ms)))
    assert both.figures[3].latency.images_per_s == pytest.approx(16e3 / both.figures[3].latency.median)
    assert len(first.latency.quantiles) == 51
    assert first.latency.quantiles[25] == pytest.approx(first.latency.median)
    assert first.latency.threads == 1


def test_streams_are_measured_apart(both: Comparison) -> None:
    assert [(own.batch, own.streams) for own in both.throughput] == [(1, 2), (16, 2)] * 2
    assert min(own.images_per_s for own in both.throughput) > 0


def test_the_document_says_what_it_was_measured_on_and_reads_back(both: Comparison) -> None:
    document = json.loads(both.model_dump_json())
    assert json.loads(Comparison.model_validate(document).model_dump_json()) == document
    assert document["models"][0]["session"]["intra_op_threads"] == 1
    assert document["measurement"]["inputs"] == "random"
    assert document["environment"]["cpu"]


def test_the_table_fits_80_columns(both: Comparison) -> None:
    text = shown(both)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("a/model.onnx") >= 2
    assert f"{both.figures[1].speedup:.2f}x" in text
    assert "2 streams" in text
    doubtful = both.model_copy(update={"warnings": ["a: unstable"]})
    assert "a: unstable" in shown(doubtful)


def test_an_exported_model_is_measured_next_to_a_foreign_one(vit: Exported, tmp_path: Path) -> None:
    found = measured(vit.report.path, two_inputs(tmp_path / "lookup.onnx"))
    assert [own.label for own in found.models] == ["model.onnx", "lookup.onnx"]
    assert found.figures[1].latency.median > 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with engines of two networks that run here, and one that was built for another device."""
    folder = tmp_path_factory.mktemp("runs") / "demo-r0.50"
    folder.mkdir()
    (folder / "recipe.toml").write_text('model = "demo"\n')
    for name, layers in (("dense", 30), ("pruned", 10)):
        exported = matmul(folder / "4-export" / name / "model.onnx", layers=layers)
        built = folder / "5-engine" / "onnxruntime-fp32" / name
        runtime_named(ONNXRUNTIME).build(exported, built, BuildOptions())
    foreign = folder / "5-engine" / "tensorrt-rtx-fp16" / "dense"
    shutil.copytree(folder / "5-engine" / "onnxruntime-fp32" / "dense", foreign)
    record = json.loads((foreign / "build.json").read_text())
    record |= {"runtime": "tensorrt-rtx", "precision": "fp16", "targets": ["sm86"]}
    (foreign / "build.json").write_text(json.dumps(record))
    return folder


def test_a_run_brings_all_engines_that_run_here(run: Path) -> None:
    found = compare([run], seconds=0.2, threads=1)
    assert [own.name for own in found.models] == [
        "demo-r0.50 dense onnxruntime fp32", "demo-r0.50 pruned onnxruntime fp32"
    ]  # fmt: skip
    assert [own.name for own in found.skipped] == ["demo-r0.50 dense tensorrt-rtx fp16"]
    assert "GPU" in found.skipped[0].why or "sm86" in found.skipped[0].why
    assert "not measured: demo-r0.50 dense tensorrt-rtx fp16" in shown(found)


def test_an_engine_that_was_named_and_does_not_run_is_refused(run: Path) -> None:
    assert len(find_targets([run / "5-engine/onnxruntime-fp32/pruned"], "auto", (1,))[0]) == 1
    if runtime_named("tensorrt-rtx").missing_to_run() is not None:
        with pytest.raises(MissingDependencyError, match="cannot be measured"):
            find_targets([run / "5-engine/tensorrt-rtx-fp16/dense"], "auto", (1,))
    with pytest.raises(UserError, match="nothing to measure"):
        find_targets([run], "tensorrt-rtx", (1,))


def test_a_batch_outside_of_an_engines_profile_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_named("tensorrt-rtx")
    monkeypatch.setattr(compare_targets, "device_here", lambda: "sm86")
    monkeypatch.setattr(type(runtime), "missing_to_run", lambda self: None)
    engine = run / "5-engine/tensorrt-rtx-fp16/dense"
    assert len(find_targets([engine], "auto", (1, 32))[0]) == 1
    with pytest.raises(UserError, match="cannot be measured") as error:
        find_targets([engine], "auto", (1, 33))
    assert "1 to 32" in error.value.why
    targets, skipped = find_targets([run], "auto", (33,))
    assert len(targets) == 2  # ONNX Runtime takes every batch
    assert len(skipped) == 1
    monkeypatch.setattr(compare_targets, "device_here", lambda: "sm120")
    with pytest.raises(UserError) as error:
        find_targets([engine], "auto", (1,))
    assert "sm120" in error.value.why


def test_what_is_no_model_is_refused(tmp_path: Path, run: Path) -> None:
    model = matmul(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="there is no") as error:
        find_targets([tmp_path / "modle.onnx"], "auto", (1,))
    assert "model.onnx" in error.value.why
    with pytest.raises(UserError, match="nothing that can be measured"):
        find_targets([tmp_path], "auto", (1,))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="nothing that can be measured"):
        find_targets([tmp_path / "notes.txt"], "auto", (1,))
    (tmp_path / "broken.onnx").write_bytes(model.read_bytes()[:-200])
    with pytest.raises(UserError, match="not an ONNX model"):
        find_targets([tmp_path / "broken.onnx"], "auto", (1,))
    with pytest.raises(UserError, match="named twice"):
        find_targets([model, tmp_path / "." / "model.onnx"], "auto", (1,))
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "recipe.toml").touch()
    with pytest.raises(UserError, match="nothing to measure"):
        find_targets([empty], "auto", (1,))


def test_runtimes_are_checked(tmp_path: Path) -> None:
    model = matmul(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="did you mean onnxruntime"):
        find_targets([model], "onxruntime", (1,))
    if runtime_named("tensorrt").missing_to_run() is not None:
        with pytest.raises(MissingDependencyError):
            compare([model], runtimes="tensorrt")


@pytest.mark.parametrize("options", [{"batches": ()}, {"batches": (0,)}, {"batches": (1, 1)}, {"streams": (0,)}])
def test_absurd_requests_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot be measured"):
        measured(matmul(tmp_path / "model.onnx"), **options)


def feeds(sizes: tuple[int | None, ...] | None, batch: int = 2, **shapes: tuple[int, ...]) -> tuple[int, ...]:
    return random_feeds([Input("x", FLOAT, sizes)], batch, shapes, "m")["x"].shape


def test_open_axes_are_filled_or_asked_for() -> None:
    assert feeds((None, 3)) == (2, 3)
    assert feeds((None, 3, None, None), x=(1, 3, 32, 48)) == (2, 3, 32, 48)
    assert feeds(None, x=(1, 5)) == (2, 5)
    assert feeds((2, 3)) == (2, 3)
    with pytest.raises(UserError, match=r"\?x3x\?x\?") as error:
        feeds((None, 3, None, None))
    assert "--input-shape x=224x3x224x224" in error.value.fix
    with pytest.raises(UserError, match="open sizes"):
        feeds(None)
    with pytest.raises(UserError, match="does not take batch 2") as error:
        feeds((8, 3))
    assert "--batches 8" in error.value.fix
    for wrong in ((1, 4), (1, 3, 3)):
        with pytest.raises(UserError, match="does not fit"):
            feeds((None, 3), x=wrong)
    with pytest.raises(UserError, match=r"no input 'images'; did you mean image\?"):
        random_feeds([Input("image", FLOAT, (None, 3))], 1, {"images": (1, 3)}, "m")
    with pytest.raises(UserError, match="not known"):
        random_feeds([], 1, {}, "m")
    assert random_feeds([], 3, {"x": (1, 4)}, "m")["x"].shape == (3, 4)


def test_absurd_shapes_are_refused_before_they_are_allocated() -> None:
    with pytest.raises(UserError, match="too large"):
        feeds((None, 2**20, 2**20))


def test_random_inputs_have_the_models_types() -> None:
    kinds = (np.float32, np.float16, np.uint8, np.int64, np.bool_)
    inputs = [Input(np.dtype(kind).name, np.dtype(kind), (None, 500)) for kind in kinds]
    made = random_feeds(inputs, 1, {}, "m")
    assert {name: array.dtype.name for name, array in made.items()} == {own.name: own.name for own in inputs}
    assert made["float32"].std() == pytest.approx(1, abs=0.2)
    assert made["uint8"].max() > 200
    assert set(np.unique(made["int64"])) == {0, 1}
    again = random_feeds([replace(own) for own in inputs], 1, {}, "m")
    assert all(np.array_equal(made[name], again[name]) for name in made)


def test_inputs_that_are_no_numbers_are_refused() -> None:
    text = helper.make_tensor_value_info("words", TensorProto.STRING, ["batch"])
    graph = helper.make_graph([helper.make_node("Identity", ["words"], ["y"])], "text", [text], [text])
    with pytest.raises(UserError, match="words"):
        inputs_of(helper.make_model(graph), "m")
