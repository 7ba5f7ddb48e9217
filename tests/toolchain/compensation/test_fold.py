"""Folding changes the weights and not the function; what cannot be folded is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits.calib_data.errors import UserError
from upvits.toolchain.compensation.fold import fold, fold_layer_scale, readings, stream_can_rotate

DEIT = VARIANTS[0]
FIXED = {
    "vit_small_patch14_reg4_dinov2": "no head",
    "vit_medium_patch16_clip_224": "before its blocks",
    "pvt_v2_b0": "LayerNorm",
    "pvt_v2_b1": "LayerNorm",
    "pvt_v2_b2_li": "LayerNorm",
}
rotatable = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.architecture not in FIXED], ids=str)


def relative_gap(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


@rotatable
@torch.inference_mode()
def test_folding_keeps_the_function(variant: Variant) -> None:
    model, images = make(variant), pictures(variant)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert relative_gap(model.double()(images.double()), folded(images.double())) < 1e-10
    assert all(torch.equal(before[name], tensor.float()) for name, tensor in model.state_dict().items())


@rotatable
@torch.inference_mode()
def test_a_folded_stream_has_mean_zero_and_plain_norms(variant: Variant) -> None:
    folded, images = fold(make(variant)), pictures(variant)
    means: list[float] = []
    for reading in readings(folded):
        norm: Any = folded.get_submodule(reading.norm)
        norm.register_forward_pre_hook(lambda _, args: means.append(float(args[0].mean(dim=-1).abs().max())))
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    folded(images.double())
    assert len(means) == len(readings(folded)) == 5
    assert max(means) < 1e-12
    assert all((p == 1).all() for name, p in folded.named_parameters() if name.endswith("gamma"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_only_what_has_a_reason_is_refused(variant: Variant) -> None:
    model = make(variant)
    reason = stream_can_rotate(model)
    if variant.architecture not in FIXED:
        assert reason is None
        return
    assert reason is not None
    assert FIXED[variant.architecture] in reason
    with pytest.raises(UserError, match=FIXED[variant.architecture]):
        fold(model)


def small(**args: Any) -> nn.Module:
    model: nn.Module = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, **{"num_classes": 5, **args}
    )
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"global_pool": "max"}, "maximum"),
        ({"qkv_bias": False}, "no bias"),
        ({"final_norm": False}, "without a norm"),
        ({"embed_norm_layer": nn.LayerNorm}, "patch embedding"),
        ({"num_classes": 0}, "no head"),
    ],
)
def test_networks_built_otherwise(args: dict[str, Any], reason: str) -> None:
    assert reason in str(stream_can_rotate(small(**{"num_heads": 3, **args})))


def test_a_reader_without_bias_is_fine_when_the_norm_adds_nothing() -> None:
    model = small(num_heads=3, qkv_bias=False)
    model.get_parameter("blocks.0.norm1.bias").data.zero_()
    images = pictures(DEIT)
    with torch.inference_mode():
        folded = fold(model)(images.double())
        assert relative_gap(model.double()(images.double()), folded) < 1e-10


@torch.inference_mode()
def test_layer_scale_folds_on_its_own() -> None:
    variant = next(v for v in VARIANTS if "dinov2" in v.architecture)
    model, images = make(variant), pictures(variant)
    expected = model(images)
    fold_layer_scale(model)
    assert relative_gap(expected, model(images)) < 1e-5
    assert (model.get_parameter("blocks.1.ls2.gamma") == 1).all()
