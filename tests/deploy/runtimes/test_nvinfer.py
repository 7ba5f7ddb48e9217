"""What is refused before and after a build: targets, operators, and engines that are less than planned."""

import gc
import json
from pathlib import Path

import onnx
import pytest
from onnx import helper

import upvits.deploy.runtimes.nvinfer
from tests.deploy.conftest import Exported
from upvits.calib_data.errors import BuildError, GateError, UserError
from upvits.deploy.precision import calibrate, convert
from upvits.deploy.runtimes import BatchProfile, BuildOptions, Built, Engine, read_engine
from upvits.deploy.runtimes.engine_folder import check_built
from upvits.deploy.runtimes.nvinfer import check_device, check_targets, check_version, is_out_of_memory, messages
from upvits.deploy.runtimes.tensorrt_rtx import TENSORRT_RTX


def built(gemms: dict[str, int], planned: dict[str, int], fused: int | None = 12) -> Built:
    return Built("test", 80, {}, gemms, planned, 12, fused, 0, 0, None)


@pytest.mark.parametrize(
    ("gemms", "planned"),
    [
        ({"int8": 50}, {"int8": 50}),
        ({"int8": 48, "removed": 2}, {"int8": 50}),
        ({"fp32": 50}, {"fp32": 50}),
        ({"fp16": 60}, {"fp16": 50, "other": 10}),
    ],
)
def test_as_much_as_planned_passes(gemms: dict[str, int], planned: dict[str, int]) -> None:
    check_built(built(gemms, planned), BuildOptions("int8", require_fused_attention=True), TENSORRT_RTX)
    check_built(None, BuildOptions(require_fused_attention=True), TENSORRT_RTX)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_less_than_planned_is_refused_with_both_numbers(precision: str) -> None:
    with pytest.raises(GateError, match=f"tensorrt-rtx built 3 of 50 {precision} layers") as refusal:
        check_built(built({precision: 3, "fp32": 47}, {precision: 50}), BuildOptions(precision), TENSORRT_RTX)
    assert refusal.value.exit_code == 4
    assert "47 in fp32" in refusal.value.why
    assert refusal.value.fix


@pytest.mark.parametrize(("fused", "required", "refused"), [(11, True, True), (11, False, False), (None, True, False)])
def test_unfused_attention_is_refused_only_on_request(fused: int | None, required: bool, refused: bool) -> None:
    made = built({"fp16": 50}, {"fp16": 50}, fused)
    options = BuildOptions("fp16", require_fused_attention=required)
    if not refused:
        check_built(made, options, TENSORRT_RTX)
        return
    with pytest.raises(GateError, match="fused 11 of 12 attention blocks") as refusal:
        check_built(made, options, TENSORRT_RTX)
    assert "head_dim" in refusal.value.fix


@pytest.mark.parametrize(
    ("precision", "targets", "lacking"),
    [
        ("fp8", ("sm86", "sm89"), "sm86"),
        ("bf16", ("sm75", "sm120"), "sm75"),
        ("int8", ("sm75", "sm86"), None),
        ("fp8", ("SM89", "sm120", "sm121"), None),
        ("fp32", ("sm75",), None),
    ],
)
def test_a_precision_that_a_target_lacks_is_refused(
    precision: str, targets: tuple[str, ...], lacking: str | None
) -> None:
    if lacking is None:
        check_targets("tensorrt-rtx", (precision,), targets)
        return
    with pytest.raises(UserError, match=f"cannot build {precision} for {lacking}\n") as refusal:
        check_targets("tensorrt-rtx", (precision,), targets)
    assert {"fp8": "sm89", "bf16": "sm80"}[precision] in refusal.value.why


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.mark.usefixtures("rtx")
def test_fp8_is_refused_before_the_build(vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(vit.report.path)
    ranges = calibrate(model, [vit.images.numpy()], quiet=True)
    onnx.save(convert(model, "fp8", ranges=ranges).model, tmp_path / "fp8.onnx")
    monkeypatch.setattr(upvits.deploy.runtimes.nvinfer, "messages", lambda trt: pytest.fail("a build was started"))
    # also when the file is fp8 and the options say something else
    for precision in ("fp8", "fp16"):
        with pytest.raises(UserError, match="cannot build fp8 for sm86"):
            TENSORRT_RTX.build(tmp_path / "fp8.onnx", tmp_path / "engine", BuildOptions(precision, targets=("sm86",)))
    assert not (tmp_path / "engine").exists()


@pytest.mark.usefixtures("rtx")
def test_turing_has_no_fp32_products(vit: Exported, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp32 for sm75"):
        TENSORRT_RTX.build(vit.report.path, tmp_path / "engine", BuildOptions(targets=("sm75", "sm86")))


def operators(*kinds: tuple[str, str]) -> onnx.ModelProto:
    """A chain of operators with these names."""
    nodes, last = [], "x"
    for name, kind in kinds:
        domain = "com.example" if kind.startswith("Un") else ""
        nodes.append(helper.make_node(kind, [last], [f"{name}_out"], name, domain=domain))
        last = f"{name}_out"
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", last)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    return helper.make_model(helper.make_graph(nodes, "chain", ends[:1], ends[1:]), opset_imports=opsets, ir_version=10)


@pytest.mark.usefixtures("rtx")
def test_all_operators_that_the_parser_refuses_are_named(tmp_path: Path) -> None:
    model = operators(("first", "Unheard"), ("fine", "Relu"), ("second", "Bernoulli"), ("third", "Unknown"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BuildError) as failure:
        TENSORRT_RTX.build(tmp_path / "model.onnx", tmp_path / "engine", BuildOptions())
    for said in ("first (Unheard)", "second (Bernoulli)", "third (Unknown)"):
        assert said in failure.value.what
        assert f"{said}: " in failure.value.why
    assert "fine" not in str(failure.value)


@pytest.mark.usefixtures("rtx")
def test_the_logger_outlives_builders() -> None:
    """TensorRT-RTX keeps using the first logger that it got, and crashes when that is collected."""
    import tensorrt_rtx as trt

    assert messages(trt) is messages(trt)
    builder = trt.Builder(messages(trt))
    del builder
    gc.collect()
    network = (builder := trt.Builder(messages(trt))).create_network(0)
    messages(trt).errors.clear()
    assert not trt.OnnxParser(network, messages(trt)).parse(b"no model")
    assert messages(trt).errors
    del builder


@pytest.mark.usefixtures("rtx")
def test_the_record_keeps_what_was_built(vit: Exported, tmp_path: Path) -> None:
    model = convert(onnx.load(vit.report.path), "fp16").model
    onnx.save(model, tmp_path / "fp16.onnx")
    options = BuildOptions("fp16", BatchProfile(1, 2, 4), ("SM89",), timing_cache=tmp_path / "unused.cache")
    engine = TENSORRT_RTX.build(tmp_path / "fp16.onnx", tmp_path / "engine", options)
    assert not (tmp_path / "unused.cache").exists()  # this library has no timings to keep
    assert engine.targets == ("sm89",)
    again = read_engine(tmp_path / "engine")
    assert again == engine
    assert isinstance(again.built, Built)
    record = json.loads((tmp_path / "engine/build.json").read_text())
    assert record["format_version"] == 2
    assert record["built"]["planned"] == {"fp16": 10}

    del record["built"]
    (tmp_path / "engine/build.json").write_text(json.dumps({**record, "format_version": 1}))
    assert read_engine(tmp_path / "engine").built is None
    (tmp_path / "engine/build.json").write_text(json.dumps({**record, "format_version": 7}))
    with pytest.raises(UserError, match="another version of this tool") as refusal:
        read_engine(tmp_path / "engine")
    assert "7" in refusal.value.why


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        ("Cuda Runtime (out of memory)", True),
        ("OutOfMemory (no further information)", True),
        ("[checkMacros] MEMORY_ALLOCATION failed", True),
        ("node_3 has no runners that implement it", False),
    ],
)
def test_messages_about_memory_are_known(said: str, memory: bool) -> None:
    assert is_out_of_memory(said) == memory


def engine_for(folder: Path, *targets: str, version: str = "1.7.1") -> Engine:
    return Engine(
        folder=folder, runtime="tensorrt-rtx", precision="fp16", targets=targets, file="engine.plan", bytes=1,
        seconds=1.0, sha256="", library="tensorrt-rtx", library_version=version, onnx_sha256="", batch=BatchProfile(),
        settings={},
    )  # fmt: skip


def test_an_engine_of_another_library_version_is_refused(tmp_path: Path) -> None:
    check_version(engine_for(tmp_path, version="1.7.1"), "1.7.1")
    with pytest.raises(UserError, match=r"built with tensorrt-rtx 1\.2\.0\n.*1\.7\.1"):
        check_version(engine_for(tmp_path, version="1.2.0"), "1.7.1")


def test_an_engine_for_another_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upvits.deploy.runtimes.nvinfer, "compute_capability", lambda: (8, 6))
    check_device(engine_for(tmp_path, "sm86", "sm120"))
    with pytest.raises(UserError, match=r"built for sm89, sm120\n.*is sm86"):
        check_device(engine_for(tmp_path, "sm89", "sm120"))
