"""Nodes of exported graphs are named after modules, and layers of runtimes lead back to them."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
from onnx import TensorProto, helper

from upvits.calib_data import Preprocess
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.graphs.files import load_model
from upvits.deploy.graphs.names import module_of, name_after_modules
from upvits.deploy.runtimes import open_onnx

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 32},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
}
HAS = {
    "vit_tiny_patch16_224": {"blocks.1.mlp.fc1", "blocks.0.attn.qkv", "norm", "head"},
    "pvt_v2_b0": {"stages.3.blocks.0.mlp.fc1", "stages.0.blocks.0.mlp.fc2", "stages.0.blocks.0.attn.sr", "head"},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_node_has_its_own_name_of_a_module(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=5, **SMALL[name])
    modules = {path for path, _ in model.named_modules()}
    preprocess = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    export_onnx(model, tmp_path / "model.onnx", preprocess)
    graph = load_model(tmp_path / "model.onnx").graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names) > 40
    found = {module_of(node) for node in names}
    assert found - {"model"} <= modules
    assert HAS[name] <= found
    assert ([v.name for v in graph.input], [v.name for v in graph.output]) == (["images"], ["logits"])
    with open_onnx(tmp_path / "model.onnx") as session:  # the graph still runs
        assert session.output_names == ("logits",)


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        ("stages.0.blocks.0.mlp.fc1/MatMul_hidden_nchwc", "stages.0.blocks.0.mlp.fc1"),
        ("stages.0.blocks.0.attn/MatMul/MatMulScaleFusion/", "stages.0.blocks.0.attn"),
        ("[blocks.0.norm1/LayerNormalization, blocks.0.attn.qkv/MatMul]", "blocks.0.norm1 + blocks.0.attn.qkv"),
        ("a/X + b/X + c/X + d/X + e/X", "a + b + c + 2 more"),
        ("node_MatMul_52", "node_MatMul_52"),  # a run of an older version
        ("/stages.2/blocks.0/attn/q/MatMul", "/stages.2/blocks.0/attn/q/MatMul"),
        ("ReorderOutput_token_166", "ReorderOutput_token_166"),
        ("", ""),
    ],
)
def test_a_layer_shows_its_modules_or_its_own_name(layer: str, shown: str) -> None:
    assert module_of(layer) == shown


def test_nodes_without_a_known_origin_belong_to_the_model() -> None:
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in (("x", "y"), ("y", "z"), ("z", "out"))]
    for node, told in zip(nodes, ("", "['', 'a.b', 'relu']", "__import__('os').abort()"), strict=True):
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", told
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "out")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    name_after_modules(model)
    assert [node.name for node in model.graph.node] == ["model/Relu", "a.b/Relu", "model/Relu_2"]
    assert [[*node.input, *node.output] for node in model.graph.node] == [
        ["x", "model/Relu_out"], ["model/Relu_out", "a.b/Relu_out"], ["a.b/Relu_out", "out"]]  # fmt: skip
    onnx.checker.check_model(model)
