"""A timm ViT or DeiT, pruned or not, as the backbone of a detector: a simple feature pyramid on its last tokens.

A plain ViT has one resolution. Following ViTDet (Li et al., arXiv 2203.16527, section 3), four levels are made from its
last feature map by transposed convolutions and pooling, without merging levels before. Its windowed attention is not
taken over: networks keep the attention that they were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import Format, LayerNorm2d
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.detection.backbone import Source, freeze, frozen_parts, network_from, set_drop_path
from upvits.toolchain.families import FAMILIES, family_of


class UPViT(nn.Module):
    """Four levels at a quarter, half, once and twice the patch size, all of the same width.

    Images may have any size that is a multiple of twice the patch size; position embeddings are resampled to it.

    Args:
        model: a model folder, a timm name, or a structure document.
        out_channels: of every level.
        out_indices: levels that are returned.
        frozen_stages: so many blocks (and the patch embedding) get no gradients and stay in eval mode; -1 and 0: none.
        with_cp: recompute blocks in the backward pass instead of keeping their activations.
        drop_path_rate: of stochastic depth, rising over the blocks; None leaves what the model has.

    Raises:
        UserError: the model cannot be loaded, or is no ViT.
    """

    def __init__(
        self,
        model: Source,
        out_channels: int = 256,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        init_cfg: None = None,
    ) -> None:
        super().__init__()
        net = network_from(model)
        if family_of(net) is not FAMILIES["vit"]:
            raise UserError(f"{type(net).__name__} is no ViT.", fix="Use the backbone UPPVTv2 for PVTv2.")
        net.reset_classifier(0)
        net.norm, net.fc_norm = nn.Identity(), nn.Identity()  # they are for pooled features; every level has its norms
        _take_any_size(net)
        self.net = net
        self.out_indices = tuple(out_indices)
        self.channels = (out_channels,) * len(self.out_indices)
        patch = int(net.patch_embed.patch_size[0])
        if patch != 16:
            raise UserError(
                f"A ViT with patches of {patch} pixels has no levels at strides 4, 8, 16 and 32.",
                fix="Use one with patches of 16.",
            )
        self.strides = tuple((patch // 4, patch // 2, patch, 2 * patch)[index] for index in self.out_indices)
        width = int(net.embed_dim)
        scaled = (
            (nn.ConvTranspose2d(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU(),
             nn.ConvTranspose2d(width // 2, width // 4, 2, 2)),
            (nn.ConvTranspose2d(width, width // 2, 2, 2),),
            (),
            (nn.MaxPool2d(2, 2),),
        )  # fmt: skip
        widths = (width // 4, width // 2, width, width)
        self.levels = nn.ModuleList(
            nn.Sequential(*scaled[index], *_to_width(widths[index], out_channels)) for index in self.out_indices
        )
        if drop_path_rate is not None:
            set_drop_path(list(net.blocks), drop_path_rate)
        net.set_grad_checkpointing(with_cp)
        self.frozen = frozen_parts(net.patch_embed, net.blocks, frozen_stages)
        self.train(self.training)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features [B, out_channels, H / s_i, W / s_i] of images [B, 3, H, W]."""
        (last,) = self.net.forward_intermediates(images, indices=1, intermediates_only=True)
        return tuple(level(last) for level in self.levels)

    def init_weights(self) -> None:
        """mmengine calls this before training; the network has its weights, and the levels torch's own."""

    def train(self, mode: bool = True) -> UPViT:
        """As usual, but frozen blocks stay as they are."""
        super().train(mode)
        freeze(self.frozen)
        return self


def _to_width(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def _take_any_size(net: Any) -> None:
    """What timm's `dynamic_img_size` sets while a ViT is built."""
    net.dynamic_img_size = True
    net.patch_embed.strict_img_size = False
    net.patch_embed.flatten = False
    net.patch_embed.output_fmt = Format.NHWC
