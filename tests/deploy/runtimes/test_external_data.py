"""Engines whose weights are in a file of their own, because one protobuf file ends at 2 GiB. Here it ends earlier."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import upvits.deploy.graphs.files
from tests.deploy.conftest import Exported
from tests.deploy.runtimes.fake_trt import fake_module
from upvits.calib_data.errors import GateError, UserError
from upvits.deploy.graphs.files import load_model, save_model
from upvits.deploy.precision import calibrate, convert
from upvits.deploy.runtimes import (
    RUNTIMES,
    BatchProfile,
    BuildOptions,
    Built,
    Engine,
    Runtime,
    open_model,
    read_engine,
)
from upvits.deploy.runtimes.engine_folder import check_built
from upvits.deploy.runtimes.nvinfer import compile_engine
from upvits.deploy.runtimes.tensorrt import TENSORRT
from upvits.deploy.runtimes.tensorrt_rtx import TENSORRT_RTX
from upvits.deploy.store.artifacts import file_digest

LIMIT = 10_000
FILES = ["build.json", "model.onnx", "model.onnx.data"]


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    found = RUNTIMES[request.param]
    if (missing := found.missing_to_build()) is not None:
        pytest.skip(missing.why)
    return found


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upvits.deploy.graphs.files, "MAX_FILE_BYTES", LIMIT)


def options(precision: str = "fp32") -> BuildOptions:
    return BuildOptions(precision, BatchProfile(1, 2, 5))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def logits(runtime: Runtime, engine: Engine, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with runtime.open(engine.folder) as session:
        assert session.layer_times({"images": images}, 1)
        return session.run({"images": images})["logits"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_large_model_becomes_an_engine_of_two_files(
    runtime: Runtime,
    precision: str,
    vit: Exported,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if precision not in runtime.precisions:
        pytest.skip(f"{runtime.name} does not build {precision} here")
    model, images = onnx.load(vit.report.path), vit.images.numpy()
    ranges = calibrate(model, [images], quiet=True) if precision == "int8" else None
    onnx.save(convert(model, precision, ranges=ranges, base_precision="fp32").model, path := tmp_path / "model.onnx")
    whole = runtime.build(path, tmp_path / "whole", options(precision))
    monkeypatch.setattr(upvits.deploy.graphs.files, "MAX_FILE_BYTES", LIMIT)
    apart = runtime.build(path, tmp_path / "apart", options(precision))
    assert names(whole.folder) == FILES[:2]
    assert names(apart.folder) == FILES
    assert apart.path.stat().st_size < whole.bytes / 4 or precision == "int8"
    data = apart.folder / "model.onnx.data"
    assert apart.bytes == apart.path.stat().st_size + data.stat().st_size
    assert json.loads((apart.folder / "build.json").read_text())["more"] == {data.name: file_digest(data)}
    assert apart.built == whole.built
    assert not list(temporary.iterdir())
    # It is opened by its path, from wherever.
    shutil.move(apart.folder, tmp_path / "moved" / "apart")
    monkeypatch.chdir(temporary)
    moved = read_engine(tmp_path / "moved" / "apart", runtime.name)
    np.testing.assert_array_equal(logits(runtime, moved, images), logits(runtime, whole, images))


def test_an_onnx_file_with_weights_apart_gives_the_same_engine(runtime: Runtime, vit: Exported, tmp_path: Path) -> None:
    save_model(onnx.load(vit.report.path), tmp_path / "model.onnx", external_data=True)
    apart = runtime.build(tmp_path / "model.onnx", tmp_path / "apart", options())
    whole = runtime.build(vit.report.path, tmp_path / "whole", options())
    assert names(apart.folder) == FILES
    images = vit.images.numpy()
    np.testing.assert_array_equal(logits(runtime, apart, images), logits(runtime, whole, images))
    # A smaller one in its place leaves nothing behind.
    runtime.build(vit.report.path, apart.folder, options())
    assert names(apart.folder) == FILES[:2]


@pytest.fixture(scope="module")
def two_files(vit: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder with weights apart."""
    folder = tmp_path_factory.mktemp("two")
    save_model(onnx.load(vit.report.path), folder / "model.onnx", external_data=True)
    RUNTIMES["onnxruntime"].build(folder / "model.onnx", folder / "engine", options())
    return folder / "engine"


def _missing(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def _changed(folder: Path) -> None:
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx.data").write_bytes(content)


def _elsewhere(folder: Path) -> None:
    (folder / "model.onnx.data").rename(folder.parent / "model.onnx.data")
    record = (folder / "build.json").read_text()
    (folder / "build.json").write_text(record.replace('"model.onnx.data"', '"../model.onnx.data"'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_missing, "lacks a file"),
        (_changed, r"\.data is damaged"),
        (_elsewhere, r"build\.json is not valid"),
    ],
)
def test_damaged_weights_are_refused(
    damage: Callable[[Path], None], said: str, two_files: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(two_files, tmp_path / "engine")
    assert read_engine(folder).precision == "fp32"
    damage(folder)
    with pytest.raises(UserError, match=said) as refusal:
        RUNTIMES["onnxruntime"].open(folder)
    assert refusal.value.why
    assert "upvits-deploy engine" in refusal.value.fix


def test_older_records_know_one_file_only(vit: Exported, tmp_path: Path) -> None:
    engine = RUNTIMES["onnxruntime"].build(vit.report.path, tmp_path / "engine", options())
    record = json.loads((engine.folder / "build.json").read_text())
    del record["more"]
    (engine.folder / "build.json").write_text(json.dumps(record))
    assert read_engine(engine.folder) == engine


def test_an_interrupted_write_leaves_no_engine(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(two_files, tmp_path / "engine")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="no space left"):
        RUNTIMES["onnxruntime"].build(two_files / "model.onnx", folder, options())
    assert names(folder) == ["model.onnx"]
    with pytest.raises(UserError, match="is not an engine folder"):
        read_engine(folder)


# --- models in memory ---


@pytest.mark.usefixtures("low_limit")
def test_a_large_model_in_memory_runs_from_files_until_it_is_closed(vit: Exported, temporary: Path) -> None:
    model, feeds = onnx.load(vit.report.path), {"images": vit.images.numpy()}
    with open_model(model, threads=1) as session:
        (folder,) = temporary.iterdir()
        assert names(folder) == FILES[1:]
        got = session.run(feeds)["logits"]
        assert session.layer_times(feeds, 1)
    assert not list(temporary.iterdir())
    upvits.deploy.graphs.files.MAX_FILE_BYTES = 2**31
    with open_model(model, threads=1) as session:
        assert not list(temporary.iterdir())
        np.testing.assert_array_equal(session.run(feeds)["logits"], got)


@pytest.mark.usefixtures("low_limit")
def test_a_large_model_that_does_not_load_leaves_no_files(vit: Exported, temporary: Path) -> None:
    model = onnx.load(vit.report.path)
    model.graph.node[-1].op_type = "Frobnicate"
    with pytest.raises(UserError, match="cannot load the model"):
        open_model(model)
    assert not list(temporary.iterdir())


# --- TensorRT ---


@pytest.mark.usefixtures("low_limit")
def test_tensorrt_rtx_reads_a_large_model_from_a_file(
    vit: Exported, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    targets = BuildOptions("fp32", BatchProfile(1, 2, 5), ("sm89",))
    from_file = TENSORRT_RTX.build(vit.report.path, tmp_path / "file", targets)
    assert not list(temporary.iterdir())
    monkeypatch.setattr(upvits.deploy.graphs.files, "MAX_FILE_BYTES", 2**31)
    from_memory = TENSORRT_RTX.build(vit.report.path, tmp_path / "memory", targets)
    assert from_file.built == from_memory.built
    assert from_file.built is not None
    # the weights are in the plan
    assert from_file.bytes == pytest.approx(from_memory.bytes, rel=0.01)
    assert names(from_file.folder) == ["build.json", "engine.plan"]


@pytest.mark.parametrize(("limit", "parsed"), [(LIMIT, "OnnxParser.parse_from_file"), (2**31, "OnnxParser.parse")])
def test_the_parser_gets_a_file_only_above_the_limit(
    limit: int, parsed: str, vit: Exported, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upvits.deploy.graphs.files, "MAX_FILE_BYTES", limit)
    model, trt = onnx.load(vit.report.path), fake_module("11.4")
    network = trt.INetworkDefinition()
    network.num_inputs = 0

    def build(*arguments: object) -> bytes:
        assert len(list(temporary.glob("*/model.onnx.data"))) == (limit == LIMIT)  # still there for the builder
        return b"plan"

    trt.behaviour |= {
        "Builder.create_network": lambda builder, flags: network,
        "Builder.create_builder_config": lambda builder: trt.IBuilderConfig(),
        "Builder.create_optimization_profile": lambda builder: trt.IOptimizationProfile(),
        "Builder.build_serialized_network": build,
        "OnnxParser.parse": lambda parser, content, path=None: onnx.load_model_from_string(content) == model,
        "OnnxParser.parse_from_file": lambda parser, path: load_model(Path(path)) == model,
    }
    assert bytes(compile_engine(trt, TENSORRT, model, vit.report.path, BuildOptions())) == b"plan"
    assert [name for name, _ in trt.calls if name.startswith("OnnxParser.parse")] == [parsed]
    assert not list(temporary.iterdir())


# --- advice ---


@pytest.mark.parametrize(
    ("runtime_name", "precision", "said", "unsaid"),
    [
        ("onnxruntime", "int8", "for engines of GPUs", "--precision"),
        ("openvino", "bf16", "for engines of GPUs", "--align"),
        ("tensorrt-rtx", "fp32", "--precision fp16 or int8", "GPUs"),
        ("tensorrt", "fp16", "--align 8", "--precision"),
        ("tensorrt-rtx", "int8", "16, 32 or 64", "--precision"),
    ],
)
def test_advice_on_unfused_attention_fits_the_engine(runtime_name: str, precision: str, said: str, unsaid: str) -> None:
    made = Built("test", 80, {}, {}, {}, 12, 0, 0, 0, None)
    with pytest.raises(GateError, match="fused 0 of 12") as refusal:
        check_built(made, BuildOptions(precision, require_fused_attention=True), RUNTIMES[runtime_name])
    assert said in refusal.value.fix
    assert unsaid not in refusal.value.fix
