"""`inspect`: weights are named for what they are, and the command that it prints is one that works."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from tests.toolchain.networks.test_checkpoints import FILES, KEYS
from tests.toolchain.networks.test_layouts import State, mae, official_pvt
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.cli.app import app
from upvits.deploy.inspection import inspect

PVT, VIT = "pvt_v2_b0", "vit_tiny_patch16_224"


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


@pytest.mark.parametrize(("name", "kind"), [("layer1.0.conv1.weight", "a ResNet"), ("x", "layout")])
def test_what_cannot_be_pruned_is_named(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no network that can be pruned") as caught:
        inspect(saved({name: torch.zeros(3, 3)}, tmp_path / "weights.pth"))
    assert kind in caught.value.why
    assert "models" in caught.value.fix


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_kinds_are_named_as_build_names_them(kind: str, tmp_path: Path) -> None:
    write, words = FILES[kind]
    write(tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no network" if kind == "ResNet" else words) as caught:
        inspect(str(tmp_path / "w.pth"))
    assert caught.value.fix


def network(name: str, **args: Any) -> Any:
    return timm.create_model(name, num_classes=12, **({} if "pvt" in name else {"img_size": 64}), **args)


@pytest.mark.parametrize("name", [PVT, VIT])
@pytest.mark.parametrize("kind", KEYS)
def test_checkpoints_under_any_key_and_behind_any_wrapper(name: str, kind: str, tmp_path: Path) -> None:
    found = inspect(saved(KEYS[kind](network(name).state_dict()), tmp_path / "w.pth"))
    assert name in (found.architecture, *found.alike)
    assert (found.family, found.classes) == ("pvt_v2" if "pvt" in name else "vit", 12)
    assert found.image == (None if "pvt" in name else (64, 64))
    words = shlex.split(found.command)
    assert words[3] in (name, *found.alike, found.architecture)
    assert ("--image-size" in words) == ("pvt" in name)


def official(state: State) -> State:
    return {f"module.{key}": tensor for key, tensor in official_pvt(state).items()}


def shards(folder: Path, state: State) -> str:
    """An index of two files."""
    names = sorted(state)
    parts = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, held in parts.items():
        save_file({key: state[key].contiguous() for key in held}, folder / file)
    index = {key: file for file, held in parts.items() for key in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return str(folder / "model.safetensors.index.json")


def timm_folder(folder: Path, model: Any) -> str:
    timm.models.save_for_hf(model, folder, model_args={"num_classes": 12, "img_size": 64})
    return f"local-dir:{folder}"


def our_folder(folder: Path, model: nn.Module) -> str:
    toolchain.save(model, folder / "out")
    return str(folder / "out")


def transformers_folder(folder: Path, _: nn.Module) -> str:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    config = transformers.ViTConfig(**sizes, image_size=64, num_labels=12)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


WRITTEN: dict[str, tuple[str, Callable[[Path, nn.Module], str]]] = {
    "official PVTv2": (PVT, lambda folder, model: saved(official(model.state_dict()), folder / "w.pth")),
    "MAE": (VIT, lambda folder, model: saved(mae(model.state_dict()), folder / "w.pth")),
    "DINO": (VIT, lambda folder, model: saved(KEYS["dino"](model.state_dict()), folder / "w.pth")),
    "shards": (VIT, lambda folder, model: shards(folder, model.state_dict())),
    "folder of shards": (VIT, lambda folder, model: str(Path(shards(folder, model.state_dict())).parent)),
    "timm's folder": (VIT, timm_folder),
    "our folder": (PVT, our_folder),
    "transformers": (VIT, transformers_folder),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITTEN)
def test_the_command_works(kind: str, tmp_path: Path) -> None:
    name, write = WRITTEN[kind]
    found = inspect(write(tmp_path, network(name)))
    words = shlex.split(found.command.replace("imagefolder:FOLDER", "demo"))
    assert words[3] in (name, *found.alike)
    result = CliRunner().invoke(app, ["plan", *words[2:], "--planner", "uniform", "--allow-weak"])
    assert result.exit_code == 0, result.output or result.exception


def test_readings_that_the_weights_leave_open_are_judged(tmp_path: Path) -> None:
    """Class folders in two orders, pooling and activation, and their combination in the command."""
    model: Any = network(VIT, global_pool="avg", fc_norm=False).eval()
    torch.manual_seed(0)
    transform = toolchain.preprocess_of(model).eval_transform()
    coarse = (255 * torch.rand(12, 4, 4, 3)).to(torch.uint8).numpy()
    images = [Image.fromarray(one).resize((64, 64)) for one in coarse]
    with torch.no_grad():  # a head that has every picture right
        tokens = model.forward_features(torch.stack([transform(image) for image in images]))
        features = model.forward_head(tokens, pre_logits=True)
        model.head.weight.copy_(torch.linalg.pinv(features - features.mean(0)).T * 20)
        model.head.bias.copy_(-model.head.weight @ features.mean(0))
    for name, image in zip(sorted(str(number) for number in range(1, 13)), images, strict=True):
        for split in ("train", "val"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            image.save(tmp_path / "set" / split / name / "x.png")
    found = inspect(saved(model.state_dict(), tmp_path / "w.pth"), f"imagefolder:{tmp_path / 'set'}")
    assert found.readings[0].top1 == 100
    read = {one.reading for one in found.readings}
    assert read >= {"classes in natural order", "classes in text order", "global_pool=avg", "act_layer=quick_gelu"}
    words = shlex.split(found.command)
    assert words[words.index("--model-arg") + 1] == "global_pool=avg"


def test_a_near_miss_says_what_differs(tmp_path: Path) -> None:
    state = timm.create_model("deit_tiny_patch16_224").state_dict()
    del state["blocks.3.attn.qkv.weight"]
    with pytest.raises(UserError, match=r"missing: blocks\.3\.attn\.qkv\.weight"):
        inspect(saved(state, tmp_path / "weights.pth"))


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_transformers_of_no_size_of_timms_gets_no_command_that_fails(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 72}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path)
    found = inspect(str(tmp_path))
    assert (found.family, found.classes, found.command) == ("vit", 0, "")
    assert "upvits.load" in found.remarks[-1]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)], env={"COLUMNS": "80"}).stdout
    assert "build" not in shown


@pytest.mark.parametrize(
    ("weights", "words", "fix"),
    [
        ("https://example.com/model.safetensors", "is an address", "Download"),
        ("hf_hub:timm/vit_tiny_patch16_224.augreg_in21k", "not on this machine", "--model vit_tiny_patch16_224.augreg"),
        ("run", "is a run", "upvits-deploy predict"),
        ("package", "is a package", "upvits-deploy predict"),
        ("detector", "is a detector's folder", "detect eval"),
        ("photo.png", "looks like a picture", "predict"),
    ],
)
def test_what_is_no_weights_is_sent_to_the_command_that_takes_it(
    weights: str, words: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (("run", "recipe.toml"), ("package", "package.json"), ("detector", "detector.json")):
        Path(folder).mkdir()
        Path(folder, file).touch()
    Image.new("RGB", (4, 4)).save("photo.png")
    with pytest.raises(UserError, match=words) as caught:
        inspect(weights)
    assert fix in caught.value.fix
