"""Weights under another name than theirs: the message names timm's architecture that they are, and that one loads."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.toolchain.networks.tiny import PVT, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data.errors import UserError


def stored(name: str, path: Path, classes: int = 1000) -> Path:
    """The weights of a network, each tensor one number that repeats: files stay small."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    state = {key: torch.full((1,), 0.01).expand(tensor.shape) for key, tensor in model.state_dict().items()}
    torch.save(state, path)
    return path


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wider": ("vit_small_patch16_224", VIT, {}),
    "other patches": ("vit_base_patch32_224", "vit_base_patch16_224", {}),
    "other patches and classes": ("vit_small_patch32_384", VIT, {}),
    "DINOv2": ("vit_small_patch14_dinov2", "vit_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", {}),
    "DeiT-III": ("deit3_small_patch16_224", "deit_small_patch16_224", {}),
    "distilled": ("deit_small_distilled_patch16_224", "deit_small_patch16_224", {}),
    "PVTv2 b1": ("pvt_v2_b1", PVT, {}),
    "deeper PVTv2": ("pvt_v2_b3", "pvt_v2_b2", {"image_size": 64}),
    "linear PVTv2": ("pvt_v2_b2_li", "pvt_v2_b2", {"image_size": 64}),
    "PVTv2 as ViT": ("pvt_v2_b0", VIT, {"image_size": 64}),
    "ViT as PVTv2": (VIT, PVT, {"image_size": 224}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_right_name_is_given_and_works(tmp_path: Path, case: str) -> None:
    real, given, options = CASES[case]
    path = stored(real, tmp_path / "w.pth", 0 if "dino" in real else 1000)
    with pytest.raises(UserError, match="does not fit") as caught:
        toolchain.create_model(given, weights=str(path), **options)
    match = re.search(r'Give `name="(\w+)"`', caught.value.fix)
    assert match is not None, caught.value
    names = [match[1], *re.findall(r"\w+_\w+", caught.value.fix.partition("(or ")[2])]
    assert real in names
    model = toolchain.create_model(
        match[1], weights=str(path), **{"image_size": None, **options} | ({"image_size": 64} if "pvt" in real else {})
    )
    assert model.num_classes == (0 if "dino" in real else 1000)


def test_what_it_looks_like_is_said(tmp_path: Path) -> None:
    path = stored("vit_small_patch14_dinov2", tmp_path / "w.pth", 0)
    with pytest.raises(UserError) as caught:
        toolchain.create_model(VIT, weights=str(path))
    assert "a ViT of width 384, depth 12, patch 14" in caught.value.why


def test_a_network_without_a_name_in_timm_gets_its_arguments(tmp_path: Path) -> None:
    model = built(VIT, patch_size=8, mlp_ratio=3.0)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not fit") as caught:
        toolchain.create_model(VIT, weights=str(tmp_path / "w.pth"))
    match = re.search(r"`model_args=(\{.*\})` and its num_heads", caught.value.fix)
    assert match is not None, caught.value
    arguments = ast.literal_eval(match[1])
    read = toolchain.create_model(VIT, weights=str(tmp_path / "w.pth"), model_args={**arguments, "num_heads": 2})
    assert torch.equal(outputs(read), outputs(model))
