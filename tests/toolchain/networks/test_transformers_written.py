"""Networks written in the layout of transformers: transformers itself loads them, with the same outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.toolchain.networks.test_transformers import KINDS, made, theirs
from tests.toolchain.networks.tiny import PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of, narrow
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.structure.groups import Widths
from upvits.toolchain.structure.timm_config import update_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def loaded(folder: Path) -> Any:
    """By transformers; every tensor has to be there."""
    config = json.loads((folder / "config.json").read_text())
    kind = transformers.AutoModelForImageClassification if "For" in config["architectures"][0] else (
        transformers.AutoModel
    )  # fmt: skip
    network, info = kind.from_pretrained(folder, output_loading_info=True)
    assert type(network).__name__ == config["architectures"][0] or "WithTeacher" in config["architectures"][0]
    assert {name for name in info["missing_keys"] if "pooler" not in name} == set()
    return network.eval()


def same(model: nn.Module, folder: Path, side: int) -> bool:
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model(image)
    return torch.allclose(theirs(loaded(folder), image), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    network = made(kind)
    network.save_pretrained(tmp_path / "theirs")
    model = toolchain.load(tmp_path / "theirs")
    toolchain.save(model, tmp_path / "ours", layout="transformers")
    config = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("theirs", "ours")]
    assert config[0]["architectures"] == config[1]["architectures"]
    assert config[1]["layer_norm_eps"] == network.config.layer_norm_eps
    side = toolchain.preprocess_of(model).input_size[1]
    if "WithTeacher" not in kind:  # the Auto class gives the network without teacher for that
        assert same(model, tmp_path / "ours", side)
    written = dict(made(kind).state_dict())
    again = getattr(transformers, kind).from_pretrained(tmp_path / "ours").state_dict()
    for name, tensor in written.items():
        assert "pooler" in name or "mask_token" in name or "position" in name or "cls_token" in name or torch.equal(
            again[name], tensor
        )  # fmt: skip
    read = toolchain.load(tmp_path / "ours")
    assert torch.allclose(outputs(read, side), outputs(model, side), rtol=1e-5, atol=1e-5)
    assert label_names_of(read) == label_names_of(model)
    assert toolchain.preprocess_of(read).mean == toolchain.preprocess_of(model).mean


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "PvtV2ForImageClassification", "Dinov2Model"])
def test_pruned_networks(tmp_path: Path, kind: str) -> None:
    made(kind).save_pretrained(tmp_path / "theirs")
    model = toolchain.load(tmp_path / "theirs")
    size = toolchain.preprocess_of(model).input_size
    scores = toolchain.score(model, method="magnitude")
    plan = toolchain.plan(model, scores, ratio=0.5, align=1, components=("ffn",), input_size=size)
    pruned = toolchain.prune(model, plan, compensate=False)
    toolchain.save(pruned, tmp_path / "ours", layout="transformers")
    assert same(pruned, tmp_path / "ours", size[1])
    toolchain.save(pruned, tmp_path / "timm")
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["layout"] == "transformers"


@pytest.mark.parametrize(
    ("crop", "squash"), [(0.875, "center"), (1.0, "center"), (1.0, "squash"), (0.9, "squash")], ids=str
)
def test_the_image_processor_is_the_same(tmp_path: Path, crop: float, squash: str) -> None:
    model = built(VIT, size=56, patch_size=14)
    update_config(model, mean=(0.1, 0.2, 0.3), crop_pct=crop, crop_mode=squash, label_names=tuple("abcde"))
    toolchain.save(model, tmp_path / "m", layout="transformers")
    read = toolchain.preprocess_of(toolchain.load(tmp_path / "m"))
    assert int(56 / read.crop_pct) == int(56 / crop)  # what both resize to
    assert replace(read, crop_pct=crop) == toolchain.preprocess_of(model)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m")
    image = torch.randint(0, 256, (3, 90, 130), dtype=torch.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56)
    assert loaded(tmp_path / "m").config.id2label == dict(enumerate("abcde"))


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        (VIT, {"global_pool": "avg"}, "pools by average"),
        (VIT, {"pre_norm": True}, "a norm before its blocks"),
        (VIT, {"reg_tokens": 2}, "registers"),
        (VIT, {"init_values": 1e-5}, "a classifier"),
        (VIT, {"class_token": False, "global_pool": "avg"}, "no class token"),
        (PVT, {}, "different numbers to the variance"),
    ],
)
def test_what_transformers_cannot_express(tmp_path: Path, name: str, args: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"no form in transformers: .*{reason}"):
        toolchain.save(built(name, size=SIZE, **args), tmp_path / "m", layout="transformers")
    assert not list(tmp_path.iterdir())


def test_widths_that_differ_from_block_to_block(tmp_path: Path) -> None:
    made("ViTForImageClassification").save_pretrained(tmp_path / "theirs")
    model: Any = toolchain.load(tmp_path / "theirs")
    kept = {group.name: group.size for group in groups_of(model) if group.kind == "ffn"} | {"blocks.0.mlp": 40}
    cut = narrow(model, Widths(kept, {})).to_empty(device="cpu")
    for parameter in cut.parameters():
        nn.init.normal_(parameter, std=0.02)
    with pytest.raises(UserError, match="widths differ from block to block"):
        toolchain.save(cut, tmp_path / "ours", layout="transformers")
    toolchain.save(cut, tmp_path / "timm")
