"""Model folders that timm itself wrote, today's and older ones: same outputs, and what they say is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.toolchain.networks.tiny import ARGS, PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data import demo_weights
from upvits.toolchain.networks.models import label_names_of

LABELS = list("abcde")


def saved(model: nn.Module, folder: Path, **options: Any) -> dict[str, Any]:
    """Write a folder with timm; its config.json."""
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, **options)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def rewritten(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", [VIT, PVT])
def test_names_of_classes_wherever_they_stand(tmp_path: Path, name: str) -> None:
    model: Any = built(name)
    saved(model, tmp_path / "top", model_config={"label_names": LABELS})
    saved(model, tmp_path / "by_index", model_config={"label_names": dict(enumerate(LABELS))})
    model.pretrained_cfg.update(num_classes=5, label_names=LABELS)
    config = saved(model, tmp_path / "inside")
    assert "label_names" not in config
    assert config["pretrained_cfg"]["label_names"] == LABELS
    for place in ("top", "by_index", "inside"):
        read = toolchain.load(tmp_path / place)
        assert label_names_of(read) == tuple(LABELS)
        assert torch.allclose(outputs(read), outputs(model), rtol=1e-5, atol=1e-5)
    config["label_names"] = ["v", "w", "x", "y", "z"]  # what stands at the top counts more, as for timm
    rewritten(tmp_path / "inside", config)
    assert label_names_of(toolchain.load(tmp_path / "inside")) == ("v", "w", "x", "y", "z")


@pytest.mark.parametrize("names", [["one", "two"], {"0": "a", "4": "e"}])
def test_names_of_other_classes_are_not_used(tmp_path: Path, names: Any) -> None:
    config = saved(built(VIT), tmp_path / "m")
    rewritten(tmp_path / "m", {**config, "label_names": names})
    assert label_names_of(toolchain.load(tmp_path / "m")) is None


def test_the_demo_weights_name_their_classes() -> None:
    folder = demo_weights("pvt_v2_b0")
    assert folder is not None
    names = label_names_of(toolchain.load(folder))
    assert names is not None
    assert names[:2] == ("plain_disk", "striped_disk")
    assert len(names) == 12


def test_folders_of_older_releases(tmp_path: Path) -> None:
    """At first everything stood in one dictionary, and no argument of the network beside size and pooling."""
    args = {name: value for name, value in ARGS[VIT].items() if name != "num_heads"} | {"num_heads": 3}
    model: Any = built(VIT, **{**args, "embed_dim": 192, "depth": 12}, global_pool="avg")
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    config = saved(model, tmp_path / "m")
    inside = {**config["pretrained_cfg"], "num_classes": 5}
    flat = {**inside, "architecture": VIT, "num_features": 192, "global_pool": "avg", "labels": LABELS}
    split = {"architecture": VIT, "num_features": 192, "global_pool": "avg", "pretrained_cfg": inside}
    for old in (flat, split):
        rewritten(tmp_path / "m", old)
        read = toolchain.load(tmp_path / "m")
        assert torch.allclose(outputs(read), outputs(model), rtol=1e-5, atol=1e-5)
        assert toolchain.preprocess_of(read).mean == (0.1, 0.2, 0.3)
        assert toolchain.preprocess_of(read).input_size == (3, SIZE, SIZE)
        assert label_names_of(read) == (tuple(LABELS) if old is flat else None)


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        (VIT, {"global_pool": "avg", "fc_norm": False}, SIZE),
        (VIT, {"global_pool": "max"}, SIZE),
        (VIT, {"act_layer": "quick_gelu", "reg_tokens": 2}, SIZE),
        (VIT, {"in_chans": 1}, SIZE),
        (VIT, {"dynamic_img_size": True}, (32, 64)),
        (VIT, {"classes": 0, "weight_init": "moco"}, SIZE),
        (VIT, {"proj_bias": False, "qkv_bias": False}, SIZE),
        ("vit_base_patch32_clip_quickgelu_224", {}, 64),
        ("vit_small_patch14_reg4_dinov2", {"classes": 0}, 28),
        ("deit_tiny_distilled_patch16_224", {}, SIZE),
        (PVT, {"in_chans": 4}, SIZE),
        (PVT, {"classes": 0}, SIZE),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_kinds_of_networks(tmp_path: Path, name: str, args: dict[str, Any], size: Any) -> None:
    model = built(name, size=size, **args)
    saved(model, tmp_path / "m")
    channels = args.get("in_chans", 3)
    ours, theirs = outputs(toolchain.load(tmp_path / "m"), size, channels), outputs(model, size, channels)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
