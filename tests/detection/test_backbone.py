"""Backbones give timm's features, and stock mmdet computes the same from translated weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.detection.conftest import small_pvt
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.detection import mmdet_names, openmm
from upvits.detection.backbone import UPPVTv2
from upvits.detection.simple_pyramid import UPViT
from upvits.toolchain.networks.models import structure_of


@pytest.mark.parametrize("name", ["dense", "uniform", "global"])
def test_features_are_those_of_timm(name: str, folders: dict[str, Path]) -> None:
    backbone = UPPVTv2(folders[name]).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        levels = backbone(images)
        network: Any = toolchain.load(folders[name])
        expected = network.forward_intermediates(images, intermediates_only=True)
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert tuple(level.shape[1] for level in levels) == backbone.channels
    assert all(torch.equal(level, other) for level, other in zip(levels, expected, strict=True))


def test_a_structure_document_and_weights_give_the_same_backbone(folders: dict[str, Path]) -> None:
    first = UPPVTv2(folders["global"], out_indices=(1, 3)).eval()
    second = UPPVTv2(structure_of(first.net), out_indices=(1, 3)).eval()
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(first(images), second(images), strict=True))


def test_frozen_stages_stay_as_they_are(folders: dict[str, Path]) -> None:
    backbone = UPPVTv2(folders["dense"], frozen_stages=2, drop_path_rate=0.3, with_cp=True).train()
    assert not backbone.net.stages[1].training
    assert backbone.net.stages[2].training
    sum(level.sum() for level in backbone(torch.randn(1, 3, 64, 64))).backward()
    with_gradient = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert not any(name.startswith(("net.patch_embed", "net.stages.0", "net.stages.1.")) for name in with_gradient)
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == with_gradient


def test_names_of_mmdet_and_back() -> None:
    state = {name: tensor for name, tensor in small_pvt().state_dict().items() if not name.startswith("head.")}
    back = mmdet_names.from_mmdet(mmdet_names.to_mmdet(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    detector = {f"backbone.{name}": tensor for name, tensor in mmdet_names.to_mmdet(state).items()}
    assert mmdet_names.from_mmdet({**detector, "neck.x.weight": torch.ones(1)}).keys() == state.keys()


@pytest.mark.usefixtures("mmdet")
@pytest.mark.parametrize("name", ["dense", "uniform"])
def test_stock_mmdet_computes_the_same(name: str, folders: dict[str, Path]) -> None:
    model: nn.Module = toolchain.load(folders[name])
    stock = openmm.build_part({"type": "PyramidVisionTransformerV2", **mmdet_names.stock_arguments(model)})
    stock.load_state_dict(mmdet_names.to_mmdet(model.state_dict()))
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = UPPVTv2(folders[name]).eval()(images)
        for level, other in zip(expected, stock.eval()(images), strict=True):
            assert float((level - other).abs().max()) < 1e-3 * float(level.abs().max())
        # what is left is timm's eps of 1e-5 in some norms, where mmdet has 1e-6 everywhere
        for module in stock.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        for part in stock.layers:  # type: ignore[union-attr]
            for norm in (part[0].norm, *(block.attn.norm for block in part[1] if block.attn.sr_ratio > 1)):
                norm.eps = 1e-5
        for level, other in zip(expected, stock(images), strict=True):
            assert torch.allclose(level, other, rtol=1e-4, atol=1e-5)


def test_stock_mmdet_has_no_global_plans(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="Stock mmdet cannot build"):
        mmdet_names.stock_arguments(toolchain.load(folders["global"]))


def test_a_vit_gets_four_levels_at_any_size() -> None:
    backbone = UPViT("deit_tiny", out_channels=32).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        levels = backbone(images)
        assert [tuple(level.shape[1:]) for level in levels] == [(32, 16, 24), (32, 8, 12), (32, 4, 6), (32, 2, 3)]
        assert backbone.strides == (4, 8, 16, 32)


def test_wrong_backbones_are_refused() -> None:
    with pytest.raises(UserError, match="no feature pyramid"):
        UPPVTv2("deit_tiny")
    with pytest.raises(UserError, match="no ViT"):
        UPViT("pvtv2_b0")
    with pytest.raises(UserError, match="patches of 14"):
        UPViT("vit_small_patch14_dinov2")
    with pytest.raises(UserError, match="no part of a PVTv2"):
        mmdet_names.to_mmdet({"blocks.0.attn.qkv.weight": torch.ones(3, 1)})
