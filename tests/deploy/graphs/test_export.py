"""Export: what PyTorch computes, under the promised names, and nothing of the caller's changed."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import timm.layers
import torch
from torch import nn

import upvits.deploy.graphs.export
import upvits.deploy.graphs.files
from tests.deploy.conftest import Exported, export_small, preprocess_for, small_model
from upvits import toolchain
from upvits.calib_data.errors import BuildError, UserError
from upvits.deploy.graphs.export import export, export_onnx
from upvits.deploy.graphs.files import load_model
from upvits.deploy.graphs.metadata import labels_in, preprocess_in, takes_pixels
from upvits.deploy.graphs.surgery import ffn_to_channels_first
from upvits.deploy.measure.parity import check_parity, model_outputs, session_outputs
from upvits.deploy.runtimes import open_onnx
from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession
from upvits.toolchain.structure.timm_config import update_config


@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_onnx_computes_what_pytorch_computes_at_any_batch(name: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    with open_onnx(exported.report.path) as session:
        for batch in (1, 2, 5):
            images = exported.images[:batch]
            check_parity(model_outputs(exported.model, [images]), session_outputs(session, [images]))


def test_names_shapes_and_metadata(vit: Exported) -> None:
    assert vit.report.inputs == ("images: float32[batch, 3, 32, 32]",)
    assert vit.report.outputs == ("logits: float32[batch, 7]",)
    model = onnx.load(vit.report.path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["labels"]) == ["cat", "dog"]
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["input_size"]) == [3, 32, 32]
    assert model.producer_name == "upvits-deploy"
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    assert vit.report.nodes == len(model.graph.node) <= vit.report.nodes_before
    assert {"Gelu", "LayerNormalization"} <= {node.op_type for node in model.graph.node}


def test_nothing_of_this_machine_is_in_the_file(vit: Exported) -> None:
    content = vit.report.path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_the_callers_model_and_timm_stay_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = small_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=0)
    attention = model.get_submodule("blocks.0.attn")
    assert attention.fused_attn
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_fused = timm.layers.use_fused_attn()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = export_onnx(model, tmp_path / "model.onnx", preprocess_for(32))
    assert report.outputs == ("features: float32[batch, 24]",)
    assert attention.fused_attn
    assert timm.layers.use_fused_attn() == use_fused
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert caught == []
    assert capfd.readouterr() == ("", "")


def test_uint8_input_normalises_in_the_graph(tmp_path: Path) -> None:
    model = small_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=4)
    preprocess = preprocess_for(32)
    report = export_onnx(model, tmp_path / "uint8.onnx", preprocess, uint8_input=True)
    assert report.inputs == ("pixels: uint8[batch, 32, 32, 3]",)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with open_onnx(report.path) as session:
        check_parity(model_outputs(model, [images]), session_outputs(session, [pixels]))


def test_ffns_of_pvt_run_channels_first(pvt: Exported) -> None:
    assert pvt.report.rewritten_ffns == 4
    model = load_model(pvt.report.path)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
    }
    hidden = {(256, 8 * 16), (64, 8 * 32), (16, 4 * 40), (4, 4 * 64)}  # tokens and FFN width of each stage
    transposed = {tuple(shapes[node.output[0]][1:]) for node in model.graph.node if node.op_type == "Transpose"}
    assert (256, 16) in transposed
    assert not transposed & (hidden | {shape[::-1] for shape in hidden})


def test_the_linear_variants_relu_moves_along(tmp_path: Path) -> None:
    widths: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64), "num_heads": (1, 2, 5, 8)}
    exported = export_small(tmp_path, small_model("pvt_v2_b2_li", num_classes=5, **widths), 224)
    assert exported.report.rewritten_ffns == 4
    images = exported.images[:2]
    with open_onnx(exported.report.path) as session:
        check_parity(model_outputs(exported.model, [images]), session_outputs(session, [images]))


def test_a_vit_has_nothing_to_rewrite(vit: Exported) -> None:
    assert vit.report.rewritten_ffns == 0


class _Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("expected 4 channels")


def test_a_model_that_fails_is_a_build_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="expected 4 channels") as failure:
        export_onnx(_Failing(), tmp_path / "model.onnx", preprocess_for(32))
    assert failure.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="opset 17"):
        export_onnx(vit.model, tmp_path / "model.onnx", vit.preprocess, opset=17)
    monkeypatch.setattr(upvits.deploy.graphs.export, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="2 GiB"):
        export_onnx(vit.model, tmp_path / "model.onnx", vit.preprocess)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_survives_a_failed_write(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"precious")

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    exported = onnx.load(vit.report.path)
    monkeypatch.setattr(upvits.deploy.graphs.export, "_run_exporter", lambda *arguments: exported)
    monkeypatch.setattr(upvits.deploy.graphs.files, "atomic_write", full)
    with pytest.raises(UserError, match="no space left"):
        export_onnx(vit.model, path, vit.preprocess)
    assert path.read_bytes() == b"precious"


def ffn_graph(**change: Any) -> onnx.ModelProto:
    """fc1, transpose, reshape, depthwise convolution and back, as timm's PVTv2 exports; `change` breaks one part."""
    rng = np.random.default_rng(0)
    hidden, groups = 6, change.get("groups", 6)
    weights = {
        "w1": rng.normal(size=(4, hidden)),
        "b1": rng.normal(size=hidden),
        "kernel": rng.normal(size=(hidden, hidden // groups, 3, 3)),
        "w2": rng.normal(size=(hidden, 4)),
        "b2": rng.normal(size=change.get("bias_shape", (4,))),
    }
    shapes = {"to_image": change.get("to_image", [-1, hidden, 3, 2]), "to_tokens": [-1, hidden, 6]}
    n = onnx.helper.make_node
    nodes = [
        n("MatMul", ["x", "w1"], ["p1"], "fc1"),
        n("Add", ["p1", "b1"], ["h"], "bias1"),
        n("Transpose", ["h"], ["t"], "transpose", perm=change.get("perm", [0, 2, 1])),
        n("Reshape", ["t", "to_image"], ["image"], "image_node"),
        n("Relu", ["image"], ["r"], "relu"),
        n("Conv", ["r", "kernel"], ["c"], "dwconv", group=groups, pads=[1, 1, 1, 1]),
        n("Reshape", ["c", "to_tokens"], ["flat"], "tokens"),
        n("Transpose", ["flat"], ["back"], "back", perm=[0, 2, 1]),
        n(change.get("activation", "Gelu"), ["back"], ["a"], "act", **change.get("attributes", {})),
        n("MatMul", ["a", "w2"], ["p2"], "fc2"),
        n("Add", ["b2", "p2"], ["y"], "bias2"),
    ]
    outputs = ["y", *([change["also_output"]] if "also_output" in change else [])]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "ffn",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 6, 4])],
        [value(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
        + [onnx.numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def rewrite(model: onnx.ModelProto) -> tuple[int, onnx.ModelProto]:
    graph = gs.import_onnx(model)
    return ffn_to_channels_first(graph), gs.export_onnx(graph)


def run(model: onnx.ModelProto) -> list[np.ndarray[Any, Any]]:
    x = np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
    with OnnxRuntimeSession(model.SerializeToString(), threads=1) as session:
        return list(session.run({"x": x}).values())


@pytest.mark.parametrize("change", [{}, {"bias_shape": (1, 1, 4)}], ids=["whole", "odd-bias"])
def test_rewrite_keeps_the_result(change: dict[str, Any]) -> None:
    model = ffn_graph(**change)
    count, rewritten = rewrite(model)
    assert count == 1
    assert [node.op_type for node in rewritten.graph.node].count("MatMul") == 0
    np.testing.assert_allclose(run(rewritten)[0], run(model)[0], atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 3},
        {"perm": [0, 1, 2], "to_image": [-1, 6, 3, 2]},
        {"also_output": "h"},
        {"also_output": "c"},
        {"also_output": "a"},
        {"activation": "Softmax"},
        {"activation": "CumSumFree"},
    ],
    ids=[
        "not-depthwise",
        "other-transpose",
        "fc1-read-twice",
        "conv-read-twice",
        "act-read-twice",
        "softmax",
        "unknown",
    ],
)
def test_rewrite_leaves_what_differs_alone(change: dict[str, Any]) -> None:
    model = ffn_graph(**change)
    count, untouched = rewrite(model)
    assert count == 0
    assert [node.op_type for node in untouched.graph.node] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("raw", [False, True])
def test_what_is_written_beside_the_graph_is_read_back(tmp_path: Path, raw: bool) -> None:
    shallow = {"depths": (1, 1, 1, 1)}
    model = toolchain.create_model("pvt_v2_b0", weights="random", num_classes=3, image_size=64, model_args=shallow)
    update_config(model, mean=(0.1, 0.2, 0.3), crop_pct=0.8, interpolation="bilinear", label_names=("a", "b", "c é"))
    export(model, tmp_path / "m.onnx", uint8_input=raw)
    read = onnx.load(tmp_path / "m.onnx")
    assert preprocess_in(read, "m.onnx") == toolchain.preprocess_of(model)
    assert labels_in(read, "m.onnx") == ("a", "b", "c é")
    assert takes_pixels(read) == raw
