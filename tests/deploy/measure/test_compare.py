"""Compare: any ONNX file, engine folder or run, measured in turns; what cannot be measured is said, not guessed."""

import itertools
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from tests.deploy.conftest import Exported
from upvits.calib_data.errors import BuildError, MissingDependencyError, UserError
from upvits.deploy.measure import compare_targets
from upvits.deploy.measure.compare import compare
from upvits.deploy.measure.compare_result import Comparison, check_output, comparison_table
from upvits.deploy.measure.compare_targets import find_targets
from upvits.deploy.measure.inputs import Input, activation_bytes, inputs_of, random_feeds
from upvits.deploy.precision.half import to_half
from upvits.deploy.runtimes import BuildOptions, Missing, runtime_named
from upvits.deploy.store.artifacts import run_stage

from ..runtimes.foreign import quantized

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
        [numpy_helper.from_array(np.ones((1, 4), np.float32), "table")],  # the only valid token is 0
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

    def build(place: Path) -> None:
        for name in ("dense", "pruned"):
            runtime_named(ONNXRUNTIME).build(exported.folder / name / "model.onnx", place / name, BuildOptions())

    def build_foreign(place: Path) -> None:
        shutil.copytree(built.folder / "dense", place / "dense")
        record = json.loads((place / "dense" / "build.json").read_text())
        record |= {"runtime": "tensorrt-rtx", "precision": "fp16", "targets": ["sm86"]}
        (place / "dense" / "build.json").write_text(json.dumps(record))

    exported = run_stage(folder, "4-export", {}, {}, lambda place: export(place, dense=30, pruned=10))
    inputs = {"onnx": exported.digest}
    built = run_stage(folder, "5-engine/onnxruntime-fp32", {}, inputs, build)
    run_stage(folder, "5-engine/tensorrt-rtx-fp16", {}, inputs, build_foreign)
    return folder


def export(place: Path, **layers: int) -> None:
    for name, count in layers.items():
        matmul(place / name / "model.onnx", layers=count)


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
    with pytest.raises(UserError, match="nothing to measure") as error:
        find_targets([run], "openvino,tensorrt", (1,))
    assert "no engine of openvino, tensorrt" in error.value.why


def test_engines_of_another_export_and_unfinished_ones_are_not_measured(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    stage = own / "5-engine" / "onnxruntime-fp32"
    shutil.copytree(stage, stage.with_name(".onnxruntime-fp32.work-0123"))
    shutil.copytree(stage, stage.with_name("onnxruntime-fp32.replaced-1"))
    assert len(find_targets([own], ONNXRUNTIME, (1,))[0]) == 2
    run_stage(own, "4-export", {"again": True}, {}, lambda place: export(place, dense=5, pruned=2))
    with pytest.raises(UserError, match="nothing to measure") as error:
        find_targets([own], ONNXRUNTIME, (1,))
    assert error.value.why.count("stale (built from another ONNX)") == 2


def test_engines_of_a_graph_in_another_precision_belong_to_its_export(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    record = own / "5-engine" / "onnxruntime-fp32" / "manifest.json"
    manifest = json.loads(record.read_text())
    for source, known in ((manifest["inputs"]["onnx"], 2), ("another export", 0)):
        made = run_stage(own, "4-precision/int8-fp32", {}, {"onnx": source}, lambda place: export(place, dense=3))
        record.write_text(json.dumps(manifest | {"inputs": {"onnx": made.digest}}))
        targets, skipped = find_targets([own, run], ONNXRUNTIME, (1,))
        assert len(targets) == known + 2
        assert len(skipped) == 2 - known


def test_a_batch_outside_of_an_engines_profile_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    through = tmp_path / "through"
    shutil.copytree(engine, through)
    record = json.loads((through / "build.json").read_text()) | {"runtime": "onnxruntime-tensorrt", "targets": []}
    (through / "build.json").write_text(json.dumps(record))
    with monkeypatch.context() as patched:
        patched.setattr(type(runtime_named(ONNXRUNTIME)), "missing_to_run", lambda self: None)
        with pytest.raises(UserError) as error:
            find_targets([through], "auto", (33,))
        assert "1 to 32" in error.value.why
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


@pytest.mark.parametrize(
    "options", [{"batches": ()}, {"batches": (0,)}, {"batches": (1, 1)}, {"streams": (0,)}, {"streams": (257,)}]
)
def test_absurd_requests_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot be measured"):
        measured(matmul(tmp_path / "model.onnx"), **options)


def feeds(sizes: tuple[int | None, ...] | None, batch: int = 2, **shapes: tuple[int, ...]) -> tuple[int, ...]:
    shape: tuple[int, ...] = random_feeds([Input("x", FLOAT, sizes)], batch, shapes, "m")["x"].shape
    return shape


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
    assert set(np.unique(made["bool"])) == {False, True}
    assert not made["int64"].any()
    again = random_feeds([replace(own) for own in inputs], 1, {}, "m")
    assert all(np.array_equal(made[name], again[name]) for name in made)


def test_inputs_that_are_no_numbers_are_refused() -> None:
    text = helper.make_tensor_value_info("words", TensorProto.STRING, ["batch"])
    graph = helper.make_graph([helper.make_node("Identity", ["words"], ["y"])], "text", [text], [text])
    with pytest.raises(UserError, match="words"):
        inputs_of(helper.make_model(graph), "m")


def custom(path: Path) -> Path:
    """An operator of a domain that the file does not even declare."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Unheard", ["x"], ["y"], domain="acme")], "custom", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_model_that_no_runtime_takes_is_an_error_also_beside_others(tmp_path: Path) -> None:
    fine, strange = matmul(tmp_path / "model.onnx"), custom(tmp_path / "custom.onnx")
    for paths in ([strange], [fine, strange]):
        with pytest.raises(BuildError, match="cannot build custom") as error:
            compare(paths, seconds=0.2)
        assert "acme" in error.value.why


def test_a_runtime_that_fails_is_left_out_unless_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = matmul(tmp_path / "model.onnx")

    def refuse(self: Any, *arguments: Any) -> None:
        raise BuildError("openvino cannot build model.onnx", why="It has a bad day.")

    openvino = runtime_named("openvino")
    monkeypatch.setattr(type(openvino), "build", refuse)
    monkeypatch.setattr(type(openvino), "precisions", ("fp32",))
    monkeypatch.setattr(type(openvino), "missing_to_run", lambda self: None if self is openvino else Missing("no", ""))
    found = compare([model], seconds=0.2, threads=1)
    assert [own.runtime for own in found.models] == [ONNXRUNTIME]
    assert [(own.name, own.why) for own in found.skipped] == [
        ("model.onnx openvino fp32", "openvino cannot build model.onnx. It has a bad day.")
    ]
    with pytest.raises(BuildError):
        compare([model], runtimes="onnxruntime,openvino", seconds=0.2, threads=1)


def test_a_narrow_graph_runs_on_the_cpu_and_the_table_says_how(vit: Exported, tmp_path: Path) -> None:
    onnx.save(to_half(onnx.load(vit.report.path), "fp16"), tmp_path / "half.onnx")
    found = measured(tmp_path / "half.onnx")
    assert [own.precision for own in found.models] == ["fp16"]
    assert found.figures[0].latency.median > 0
    assert "onnxruntime built 0 of 10 fp16 layers" in found.warnings[0]
    assert "10 in fp32" in found.warnings[0]
    assert not any("wider" in text for text in measured(vit.report.path).warnings)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="about kernels for x86")
def test_an_int8_graph_that_falls_short_runs_with_a_warning(tmp_path: Path) -> None:
    model, _ = quantized(convolution=True)
    onnx.save(model, tmp_path / "int8.onnx")
    found = measured(tmp_path / "int8.onnx")
    assert [own.precision for own in found.models] == ["int8"]
    assert "2 of 3 int8 layers" in found.warnings[0]


def test_activations_count_before_the_system_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(matmul(tmp_path / "model.onnx", ("batch", 4, 64), layers=5))
    feed = {"x": np.zeros((10, 4, 64), np.float32)}
    assert activation_bytes(model, feed) == 3 * feed["x"].nbytes
    activation_bytes(onnx.load(custom(tmp_path / "custom.onnx")), {"x": np.zeros((9, 4), np.float32)})
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**23, total=2**33))
    # 1 MiB of inputs passes alone, with 3 MiB of activations in each of two models it does not
    wide = [matmul(tmp_path / name / "wide.onnx", ("batch", 4, 64), layers=5) for name in "ab"]
    with pytest.raises(UserError, match="measuring this would take about"):
        measured(*wide, batches=(1024,))
    with pytest.raises(UserError, match="measuring this would take about") as error:
        measured(wide[0], batches=(128,), streams=(1, 64))
    assert "fewer --streams" in error.value.fix
    assert measured(wide[0], batches=(128,)).figures


def test_figures_never_replace_something_else(both: Comparison, run: Path, tmp_path: Path) -> None:
    model, notes, old = matmul(tmp_path / "model.onnx"), tmp_path / "notes.json", tmp_path / "old.json"
    notes.write_text('{"mine": 1}')
    old.write_text(both.model_dump_json())
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    (tmp_path / "file").touch()
    for output, message in (
        (model, "what is to be measured"),
        (link, "what is to be measured"),
        (run / "bench.json", "what is to be measured"),
        (notes, "holds no comparison"),
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere" / "new.json", "there is no folder"),
        (tmp_path / "file" / "new.json", "there is no folder"),
        (tmp_path / f"{'x' * 300}.json", "cannot write"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=message):
            check_output(output, [model, run])
        assert sorted(tmp_path.rglob("*")) == before
    check_output(old, [model, run])
    check_output(tmp_path / "new.json", [model, run])
    assert not (tmp_path / "new.json").exists()
