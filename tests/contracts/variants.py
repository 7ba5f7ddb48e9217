"""Small relatives of real timm models: one per feature that a family has to handle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Variant:
    """A timm architecture with arguments that make it small."""

    architecture: str
    family: str
    size: int
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.architecture


_SMALL_VIT = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}
_SMALL_PVT = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "mlp_ratios": (4, 4, 2, 2), "num_classes": 5}

VARIANTS = (
    Variant("deit_tiny_patch16_224", "vit", 32, _SMALL_VIT),
    Variant("deit_tiny_distilled_patch16_224", "vit", 32, _SMALL_VIT),
    Variant("deit3_small_patch16_224", "vit", 32, _SMALL_VIT),  # LayerScale, position embedding without class token
    Variant("vit_small_patch14_reg4_dinov2", "vit", 28, {**_SMALL_VIT, "num_classes": 0}),  # registers, no head
    Variant("vit_small_patch16_224", "vit", 32, {**_SMALL_VIT, "global_pool": "avg"}),  # fc_norm
    Variant("vit_medium_patch16_clip_224", "vit", 32, _SMALL_VIT),  # norm_pre, patch embedding without bias
    Variant("vit_base_patch16_gap_224", "vit", 32, _SMALL_VIT),  # no class token
    Variant("pvt_v2_b0", "pvt_v2", 64, _SMALL_PVT),
    Variant("pvt_v2_b1", "pvt_v2", 64, {**_SMALL_PVT, "depths": (2, 1, 1, 1)}),
    Variant("pvt_v2_b2_li", "pvt_v2", 64, _SMALL_PVT),
)


def make(variant: Variant, seed: int = 0) -> nn.Module:
    """The variant with weights that hide nothing: random biases, norms and LayerScale (timm's are zero or one)."""
    torch.manual_seed(seed)
    args = dict(variant.args)
    if variant.family == "vit":
        args["img_size"] = variant.size
    model = timm.create_model(variant.architecture, **args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("gamma"):
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif parameter.ndim < 2:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, variant.size, variant.size)}
    built: nn.Module = model.eval()
    return built


def pictures(variant: Variant, count: int = 3) -> torch.Tensor:
    """Random images [count, 3, size, size]."""
    return torch.randn(count, 3, variant.size, variant.size, generator=torch.Generator().manual_seed(1))
