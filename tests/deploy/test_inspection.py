"""`inspect`: weights are named for what they are, and the command that it prints is one that works."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.cli.app import app
from upvits.deploy.inspection import inspect


@pytest.fixture(scope="module")
def demo() -> nn.Module:
    return toolchain.create_model("pvtv2_b0", weights="demo")


def saved(content: dict[str, Any], path: Path) -> str:
    torch.save(content, path)
    return str(path)


def test_the_size_is_found_by_accuracy_where_nothing_else_tells_it(demo: nn.Module, tmp_path: Path) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in demo.state_dict().items()}
    weights = saved({"state_dict": tensors, "epoch": 3}, tmp_path / "my weights.pth")
    found = inspect(weights, "demo")
    assert (found.architecture, found.family, found.classes, found.image) == ("pvt_v2_b0", "pvt_v2", 12, None)
    assert found.parameters == sum(parameter.numel() for parameter in demo.parameters())
    assert any("module." in note for note in found.notes)
    top1 = {one.reading: one.top1 for one in found.readings}
    assert top1["64 pixels"] > 90 > 50 > max(top1["224 pixels"], top1["128 pixels"])
    assert [*top1.values()] == sorted(top1.values(), reverse=True)
    words = shlex.split(found.command)
    assert words[:6] == ["upvits-deploy", "build", "--model", "pvt_v2_b0", "--weights", weights]
    assert words[-2:] == ["--image-size", "64"]
    result = CliRunner().invoke(app, ["plan", *words[2:]])
    assert result.exit_code == 0, result.output


def test_what_the_checkpoint_says_is_reported_with_its_source(demo: nn.Module, tmp_path: Path) -> None:
    arguments = argparse.Namespace(model="pvt_v2_b0", img_size=64, mean=[0.5, 0.5, 0.5])
    content = {"state_dict": demo.state_dict(), "args": arguments, "arch": "pvt_v2_b0", "metric": 98.5}
    found = inspect(saved(content, tmp_path / "weights.pth"))
    assert (found.image, found.recorded_top1, found.readings) == ((64, 64), 98.5, ())
    assert found.preprocess["mean"] == (0.5, 0.5, 0.5)
    assert found.sources["input_size"] == found.sources["mean"] == "the checkpoint's arguments"
    assert "timm's configuration" in found.sources["std"]
    assert "--image-size" not in found.command


def test_architectures_with_the_same_tensors_are_all_named(tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_patch16_224", num_classes=5, img_size=64)
    found = inspect(saved(model.state_dict(), tmp_path / "weights.pth"), "demo")
    assert {found.architecture, *found.alike} >= {"vit_tiny_patch16_224", "deit_tiny_patch16_224"}
    assert found.image == (64, 64)
    assert found.readings == ()
    assert "12 classes, the network 5" in found.remarks[0]


def test_a_folder_is_read_as_it_says(demo: nn.Module, tmp_path: Path) -> None:
    toolchain.save(demo, tmp_path / "folder")
    before = sorted(tmp_path.rglob("*"))
    env = {"COLUMNS": "80"}
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "folder")], env=env)
    assert result.exit_code == 0
    *lines, command = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert command.startswith("upvits-deploy build --model pvt_v2_b0")
    document = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "folder"), "--json"]).stdout)
    assert (document["image"], document["command"]) == ([64, 64], command)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "kind"), [("layer1.0.conv1.weight", "a ResNet"), ("bbox_head.fc.weight", "a detector"), ("x", "layout")]
)
def test_what_cannot_be_pruned_is_named(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no network that can be pruned") as caught:
        inspect(saved({name: torch.zeros(3, 3)}, tmp_path / "weights.pth"))
    assert kind in caught.value.why
    assert ("detect" in caught.value.fix) == (kind == "a detector")


def test_a_near_miss_says_what_differs(tmp_path: Path) -> None:
    state = timm.create_model("deit_tiny_patch16_224").state_dict()
    del state["blocks.3.attn.qkv.weight"]
    with pytest.raises(UserError, match=r"missing: blocks\.3\.attn\.qkv\.weight"):
        inspect(saved(state, tmp_path / "weights.pth"))
