"""What every runtime in the table keeps to. Where this machine lacks something, the refusal is what is tested."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from upvits.calib_data.errors import BuildError, MissingDependencyError, UserError
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.graphs.files import save_model
from upvits.deploy.measure.parity import TOLERANCES, check_parity
from upvits.deploy.precision import calibrate, convert
from upvits.deploy.runtimes import RUNTIMES, BatchProfile, BuildOptions, Runtime, open_onnx, read_engine

FLOAT = onnx.TensorProto.FLOAT
PROFILE = BatchProfile(1, 2, 4)
IMAGES = np.random.default_rng(7).normal(size=(4, 3, 8, 8)).astype(np.float32)


def small_model(*, last: str = "Gelu", domain: str = "") -> onnx.ModelProto:
    """Convolution, LayerNorm, matrix product and one operator to choose; dynamic batch."""
    rng = np.random.default_rng(0)
    weights = {
        "kernel": rng.normal(size=(16, 3, 4, 4)) / 7,
        "gain": 1 + rng.normal(size=16) / 10,
        "shift": rng.normal(size=16) / 10,
        "matrix": rng.normal(size=(16, 8)) / 4,
    }
    constants = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    constants.append(onnx.numpy_helper.from_array(np.array([-1, 4, 16], np.int64), "tokens"))
    constants.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"))
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["c"], "patches", strides=[4, 4]),
        helper.make_node("Transpose", ["c"], ["t"], "channels_last", perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["t", "tokens"], ["r"], "to_tokens"),
        helper.make_node("LayerNormalization", ["r", "gain", "shift"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "matrix"], ["m"], "head"),
        helper.make_node("ReduceMean", ["m", "axis"], ["p"], "pool", keepdims=0),
        helper.make_node(last, ["p"], ["logits"], "last_node", domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 8])],
        constants,
    )
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write(path: Path, **arguments: str) -> Path:
    onnx.save(small_model(**arguments), path)
    return path


def write_converted(path: Path, precision: str, base_precision: str) -> Path:
    """The small model in a precision: runtimes build graphs as they are."""
    model = small_model()
    ranges = calibrate(model, [IMAGES], quiet=True) if precision in ("int8", "fp8") else None
    onnx.save(convert(model, precision, ranges=ranges, base_precision=base_precision).model, path)
    return path


@pytest.fixture(params=list(RUNTIMES.values()), ids=list(RUNTIMES))
def runtime(request: pytest.FixtureRequest) -> Runtime:
    found: Runtime = request.param
    return found


@pytest.fixture
def ready(runtime: Runtime) -> Runtime:
    """A runtime that this machine can build engines for."""
    missing = runtime.missing_to_build()
    if missing is not None:
        pytest.skip(f"{runtime.name}: {missing.why}")
    return runtime


def options_for(precision: str = "fp32") -> BuildOptions:
    return BuildOptions(precision, PROFILE, workspace_mib=256)


def test_a_runtime_says_what_its_engines_run_on(runtime: Runtime) -> None:
    assert runtime.on_cpu == (runtime.base_precision == "fp32")  # no CPU of today computes in fp16
    assert not (runtime.on_cpu and (runtime.on_nvidia or runtime.has_targets or runtime.has_batch_profile))
    assert {"fp32", runtime.base_precision} <= {*runtime.precisions}


def test_only_a_runtime_with_targets_takes_some(ready: Runtime) -> None:
    if ready.has_targets:
        assert ready.targets_for("fp32", ())
        return
    assert ready.targets_for("fp32", ()) == ()
    with pytest.raises(UserError, match="no particular device"):
        ready.targets_for("fp32", ("sm86",))


def test_what_is_missing_is_said_and_building_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    missing = runtime.missing_to_build()
    if missing is None:
        pytest.skip("nothing is missing here")
    assert missing.why
    assert missing.fix
    with pytest.raises(MissingDependencyError) as refusal:
        runtime.build(write(tmp_path / "model.onnx"), tmp_path / "engine", options_for())
    assert refusal.value.exit_code == 3
    assert refusal.value.why == missing.why
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_build_records_what_it_made_and_what_runs_is_right(ready: Runtime, precision: str, tmp_path: Path) -> None:
    if precision not in ready.precisions:
        pytest.skip(f"{ready.name} does not build {precision}")
    plain = write(tmp_path / "plain.onnx")
    path = write_converted(tmp_path / "model.onnx", precision, ready.base_precision)
    engine = ready.build(path, tmp_path / "engine", options_for(precision))
    content = engine.path.read_bytes()
    assert engine.path.parent == engine.folder == tmp_path / "engine"
    assert (engine.runtime, engine.precision, engine.batch) == (ready.name, precision, PROFILE)
    assert engine.bytes == len(content) > 0
    assert engine.sha256 == hashlib.sha256(content).hexdigest()
    assert engine.onnx_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert engine.seconds >= 0
    assert engine.library_version[0].isdigit()
    if engine.built is not None:
        facts = GraphFacts(onnx.load(path))
        assert engine.built.planned == facts.gemms()
        assert engine.built.gemms == facts.gemms()
        assert engine.built.attention_blocks == 0
        assert engine.built.source
    assert read_engine(tmp_path / "engine") == engine
    record = json.loads((tmp_path / "engine" / "build.json").read_text())
    assert record["file"] == engine.path.name
    assert str(tmp_path) not in json.dumps(record)
    assert sorted(file.name for file in engine.folder.iterdir()) == sorted(["build.json", engine.path.name])

    missing = ready.missing_to_run()
    if missing is not None:
        with pytest.raises(MissingDependencyError, match="cannot run here") as refusal:
            ready.open(engine.folder)
        assert missing.fix in str(refusal.value)
        return
    with open_onnx(plain) as reference, ready.open(engine.folder) as session:
        assert session.input_names == ("images",)
        assert session.output_names == ("logits",)
        for batch in (1, 4):
            feeds = {"images": IMAGES[:batch]}
            wanted, got = reference.run(feeds)["logits"], session.run(feeds)["logits"]
            assert got.dtype == np.float32
            check_parity(wanted, got, tolerance=TOLERANCES[precision])
        times = session.time({"images": IMAGES[:2]}, 3)
        assert times.total.shape == (3,)
        for stage in (times.total, times.h2d, times.compute, times.d2h, times.enqueue):
            assert stage is None or (np.isfinite(stage).all() and (stage >= 0).all())
        assert (times.total > 0).all()
        if not ready.has_batch_profile:  # twice the largest batch that it was built for
            assert session.run({"images": np.concatenate([IMAGES, IMAGES])})["logits"].shape == (8, 8)
        layers = session.layer_times({"images": IMAGES[:2]}, 2)
        assert all(layer.ms >= 0 and layer.name for layer in layers)
    with pytest.raises(ValueError, match="closed"):
        session.run({"images": IMAGES})


def test_weights_beside_the_model_make_no_difference(ready: Runtime, tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "apart" / "model.onnx", external_data=True)
    assert (tmp_path / "apart" / "model.onnx.data").stat().st_size > 0
    whole = ready.build(write(tmp_path / "model.onnx"), tmp_path / "whole-engine", options_for())
    engine = ready.build(tmp_path / "apart" / "model.onnx", tmp_path / "engine", options_for())
    shutil.rmtree(tmp_path / "apart")
    assert read_engine(engine.folder) == engine
    files = [file for file in engine.folder.iterdir() if file.is_file() and file.name != "build.json"]
    assert engine.bytes == sum(file.stat().st_size for file in files)
    assert engine.built == whole.built
    if ready.missing_to_run() is None:
        with ready.open(engine.folder) as apart, ready.open(whole.folder) as together:
            feeds = {"images": IMAGES}
            np.testing.assert_allclose(apart.run(feeds)["logits"], together.run(feeds)["logits"], atol=1e-6)


def test_a_model_it_cannot_take_is_a_build_error_with_the_node(ready: Runtime, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", last="Frobnicate", domain="com.example")
    with pytest.raises(BuildError, match=r"node last_node \(Frobnicate\)") as failure:
        ready.build(path, tmp_path / "engine", options_for())
    assert failure.value.exit_code == 5
    assert failure.value.why
    assert not (tmp_path / "engine").exists()


def test_a_failed_build_leaves_the_old_engine(ready: Runtime, tmp_path: Path) -> None:
    engine = ready.build(write(tmp_path / "model.onnx"), tmp_path / "engine", options_for())
    broken = write(tmp_path / "broken.onnx", last="Frobnicate", domain="com.example")
    with pytest.raises(BuildError):
        ready.build(broken, tmp_path / "engine", options_for())
    assert read_engine(tmp_path / "engine") == engine


def test_building_again_replaces_the_engine(ready: Runtime, tmp_path: Path) -> None:
    ready.build(write(tmp_path / "model.onnx"), tmp_path / "engine", options_for())
    again = ready.build(write(tmp_path / "other.onnx", last="Relu"), tmp_path / "engine", options_for())
    assert read_engine(tmp_path / "engine") == again
    assert again.onnx_sha256 == hashlib.sha256((tmp_path / "other.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut"])
def test_a_broken_onnx_file_is_the_users_to_fix(ready: Runtime, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    content = small_model().SerializeToString()
    if damage != "missing":
        path.write_bytes({"empty": b"", "garbage": b"\x00garbage" * 50, "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(UserError, match=r"model\.onnx") as refusal:
        ready.build(path, tmp_path / "engine", options_for())
    assert refusal.value.exit_code == 2
    assert not (tmp_path / "engine").exists()


def _cut(folder: Path, engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-10])


def _flip(folder: Path, engine: Path) -> None:
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)


def _remove(folder: Path, engine: Path) -> None:
    engine.unlink()


def _no_record(folder: Path, engine: Path) -> None:
    (folder / "build.json").unlink()


def _cut_record(folder: Path, engine: Path) -> None:
    record = folder / "build.json"
    record.write_text(record.read_text()[:40])


def _leave_the_folder(folder: Path, engine: Path) -> None:
    record = folder / "build.json"
    record.write_text(record.read_text().replace(f'"{engine.name}"', f'"../{engine.name}"'))
    engine.rename(folder.parent / engine.name)


@pytest.mark.parametrize("damage", [_cut, _flip, _remove, _no_record, _cut_record, _leave_the_folder])
def test_a_damaged_engine_is_refused_before_anything_runs(ready: Runtime, damage: Any, tmp_path: Path) -> None:
    engine = ready.build(write(tmp_path / "model.onnx"), tmp_path / "engine", options_for())
    damage(engine.folder, engine.path)
    with pytest.raises(UserError, match="engine") as refusal:
        ready.open(engine.folder)
    assert refusal.value.exit_code == 2
    assert refusal.value.why


def test_an_engine_of_another_runtime_is_refused(ready: Runtime, tmp_path: Path) -> None:
    engine = ready.build(write(tmp_path / "model.onnx"), tmp_path / "engine", options_for())
    other = next(runtime for runtime in RUNTIMES.values() if runtime.name != ready.name)
    with pytest.raises(UserError, match=f"of {ready.name}, not of {other.name}"):
        other.open(engine.folder)


def test_files_of_the_user_are_not_touched(ready: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"precious")
    with pytest.raises(UserError, match="not an engine folder"):
        ready.build(write(tmp_path / "model.onnx"), folder, options_for())
    assert [(file.name, file.read_bytes()) for file in folder.iterdir()] == [("model.onnx", b"precious")]


def test_an_unknown_precision_is_refused(ready: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"Precisions of {ready.name}"):
        ready.build(write(tmp_path / "model.onnx"), tmp_path / "engine", options_for("fp12"))
    assert not (tmp_path / "engine").exists()


def test_an_unknown_target_is_refused(ready: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target|device|build for"):
        ready.build(write(tmp_path / "model.onnx"), tmp_path / "engine", BuildOptions(targets=("sm42",)))
    assert not (tmp_path / "engine").exists()
