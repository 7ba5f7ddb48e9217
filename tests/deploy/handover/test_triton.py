"""The Triton repository: its configuration parses with Triton's own protobuf and says what the ONNX file says."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.deploy.conftest import Exported
from upvits.calib_data.errors import UserError
from upvits.deploy.choices import BatchProfile
from upvits.deploy.handover.triton import config_text, ports, write_repository
from upvits.deploy.runtimes.interface import Engine

LABELS = ['a "quoted" name', "b", "c", "d", "e", "f", "g"]


def engine_of(folder: Path, runtime: str, smallest: int = 1) -> Engine:
    path = folder / ("model.onnx" if runtime == "onnxruntime" else "engine.plan")
    path.write_bytes(b"a plan")
    return Engine(
        folder=folder, runtime=runtime, precision="fp16", targets=("sm89",), file=path.name, bytes=6, seconds=1.0,
        sha256="", library=runtime, library_version="10.9", onnx_sha256="",
        batch=BatchProfile(smallest, 4, 16), settings={},
    )  # fmt: skip


def parsed(text: str) -> Any:
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_repository_says_what_the_models_are(vit: Exported, tmp_path: Path) -> None:
    model = onnx.load(vit.report.path)
    image, answer = ports(model)
    engine = engine_of(tmp_path, "tensorrt")
    names = write_repository(
        tmp_path / "triton", "vit", [vit.report.path], engine, image, answer, BatchProfile(1, 8, 32), LABELS
    )
    assert names == ["vit_onnx", "vit_tensorrt"]
    assert {path.name for path in (tmp_path / "triton").iterdir()} == set(names)
    assert (tmp_path / "triton/vit_onnx/1/model.onnx").read_bytes() == vit.report.path.read_bytes()
    assert (tmp_path / "triton/vit_tensorrt/1/model.plan").read_bytes() == b"a plan"

    profiles = {"vit_onnx": (8, 32), "vit_tensorrt": (4, 16)}
    for name, platform in (("vit_onnx", "onnxruntime_onnx"), ("vit_tensorrt", "tensorrt_plan")):
        config = parsed((tmp_path / "triton" / name / "config.pbtxt").read_text())
        best, largest = profiles[name]
        assert (config.name, config.platform, config.max_batch_size) == (name, platform, largest)
        for described, value in ((config.input, model.graph.input[0]), (config.output, model.graph.output[0])):
            (one,) = described
            assert one.name == value.name
            assert list(one.dims) == [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
            assert type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[one.data_type].name == (
                "TYPE_FP32"
            )
        assert list(config.dynamic_batching.preferred_batch_size) == [best, largest]
        assert config.dynamic_batching.max_queue_delay_microseconds == 1000
        kinds = type(config.instance_group[0]).DESCRIPTOR.enum_types_by_name["Kind"].values_by_name
        wanted = "KIND_GPU" if name.endswith("tensorrt") else "KIND_AUTO"
        assert [group.kind for group in config.instance_group] == [kinds[wanted].number]
        assert [warm.batch_size for warm in config.model_warmup] == [1, best, largest]
        for warm in config.model_warmup:
            assert list(warm.inputs) == ["images"]
            assert (list(warm.inputs["images"].dims), warm.inputs["images"].random_data) == ([3, 32, 32], True)
        label_file = tmp_path / "triton" / name / config.output[0].label_filename
        assert label_file.read_text().splitlines() == LABELS


def test_the_int8_graph_of_cpus_is_served_beside_the_fp32_one(vit: Exported, tmp_path: Path) -> None:
    image, answer = ports(onnx.load(vit.report.path))
    engine, batch = engine_of(tmp_path, "onnxruntime"), BatchProfile(1, 8, 32)
    folder = tmp_path / "triton"
    names = write_repository(folder, "vit", [vit.report.path], None, image, answer, batch, LABELS, cpu_int8=engine)
    assert names == ["vit_onnx", "vit_onnx_int8"]
    assert (folder / "vit_onnx/1/model.onnx").read_bytes() == vit.report.path.read_bytes()
    assert (folder / "vit_onnx_int8/1/model.onnx").read_bytes() == b"a plan"
    wide, narrow = (parsed((folder / name / "config.pbtxt").read_text()) for name in names)
    assert (narrow.name, narrow.platform, narrow.max_batch_size) == ("vit_onnx_int8", "onnxruntime_onnx", 32)
    assert (list(narrow.input), list(narrow.output)) == (list(wide.input), list(wide.output))
    kinds = type(wide.instance_group[0]).DESCRIPTOR.enum_types_by_name["Kind"].values_by_number
    assert [kinds[config.instance_group[0].kind].name for config in (wide, narrow)] == ["KIND_AUTO", "KIND_CPU"]


def test_one_image_at_a_time_needs_no_preferred_sizes(vit: Exported) -> None:
    image, answer = ports(onnx.load(vit.report.path))
    config = parsed(config_text("m", "onnxruntime", image, answer, BatchProfile(1, 1, 1), labelled=False))
    assert config.max_batch_size == 1
    assert list(config.dynamic_batching.preferred_batch_size) == []
    assert config.output[0].label_filename == ""
    assert len(config.model_warmup) == 1


@pytest.mark.parametrize(("runtime", "smallest"), [("tensorrt-rtx", 1), ("tensorrt", 2)])
def test_plans_that_triton_cannot_serve_are_refused(vit: Exported, tmp_path: Path, runtime: str, smallest: int) -> None:
    image, answer = ports(onnx.load(vit.report.path))
    engine = engine_of(tmp_path, runtime, smallest)
    with pytest.raises(UserError, match="Triton cannot serve"):
        write_repository(tmp_path / "t", "m", [], engine, image, answer, BatchProfile(), None)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("shape", [[1, 3, 32, 32], ["batch", 3, "height", 32], []])
def test_shapes_that_no_server_can_batch_are_refused(vit: Exported, shape: list[int | str]) -> None:
    model = onnx.load(vit.report.path)
    image = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)
    model.graph.input[0].CopyFrom(image)
    with pytest.raises(UserError, match="images has the shape"):
        ports(model)


def test_several_inputs_are_refused(vit: Exported) -> None:
    model = onnx.load(vit.report.path)
    model.graph.input.append(model.graph.input[0])
    with pytest.raises(UserError, match="2 inputs"):
        ports(model)
