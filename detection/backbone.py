"""A timm PVTv2, pruned or not, as the backbone of a detector: the last features of each stage.

What every backbone needs is here too: loading its network, stochastic depth, and stages that are not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import FAMILIES, family_of
from upvits.toolchain.networks.building import hollow
from upvits.toolchain.networks.config_document import config_from

Source = str | Path | Mapping[str, Any]
"""A model folder, a timm name (random weights), or a structure document (weights come with the detector's)."""


class UPPVTv2(nn.Module):
    """Feature pyramid of a PVTv2 at strides 4, 8, 16 and 32, as mmdet takes it.

    Features equal those of timm's `forward_intermediates`. Images may have any size that is a multiple of 32.

    Args:
        model: a model folder (any plan, uniform or not), a timm name, or a structure document.
        out_indices: stages whose features are returned.
        frozen_stages: so many stages (and the patch embedding) get no gradients and stay in eval mode; -1 and 0: none.
        with_cp: recompute blocks in the backward pass instead of keeping their activations.
        drop_path_rate: of stochastic depth, rising over the blocks; None leaves what the model has.

    Raises:
        UserError: the model cannot be loaded, or is no PVTv2.
    """

    def __init__(
        self,
        model: Source,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        init_cfg: None = None,
    ) -> None:
        super().__init__()
        net = network_from(model)
        if family_of(net) is not FAMILIES["pvt_v2"]:
            raise UserError(
                f"{type(net).__name__} has no feature pyramid of its own.", fix="Use the backbone UPViT for ViTs."
            )
        net.reset_classifier(0)  # a head would get no gradients, which DistributedDataParallel refuses
        self.net = net
        self.out_indices = tuple(out_indices)
        self.channels = tuple(int(net.feature_info[index]["num_chs"]) for index in self.out_indices)
        if drop_path_rate is not None:
            set_drop_path([block for stage in net.stages for block in stage.blocks], drop_path_rate)
        net.set_grad_checkpointing(with_cp)
        self.frozen = frozen_parts(net.patch_embed, net.stages, frozen_stages)
        self.train(self.training)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features [B, C_i, H / s_i, W / s_i] of images [B, 3, H, W]."""
        features = self.net.forward_intermediates(images, indices=list(self.out_indices), intermediates_only=True)
        return tuple(features)

    def init_weights(self) -> None:
        """mmengine calls this before training; the network has its weights already."""

    def train(self, mode: bool = True) -> UPPVTv2:
        """As usual, but frozen stages stay as they are."""
        super().train(mode)
        freeze(self.frozen)
        return self


def network_from(model: Source) -> Any:
    """The network that `model` names.

    Raises:
        UserError: there is no such folder or architecture.
    """
    if isinstance(model, Mapping):
        return _with_memory(hollow(config_from(model)))
    if Path(model).is_dir():
        return toolchain.load(Path(model))
    return toolchain.create_model(str(model), weights="random")


def _with_memory(net: nn.Module) -> nn.Module:
    """A network on the meta device gets weights that are replaced when the detector's are loaded."""
    net = net.to_empty(device=torch.get_default_device())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            nn.init.trunc_normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.constant_(
                parameter, float("norm" in name and name.endswith("weight"))
            )
    return net


def set_drop_path(blocks: Sequence[Any], rate: float) -> None:
    """Stochastic depth that rises linearly from 0 at the first block to `rate` at the last."""
    for index, block in enumerate(blocks):
        share = rate * index / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(share) if share else nn.Identity())


def frozen_parts(embedding: nn.Module, stages: Iterable[nn.Module], count: int) -> list[nn.Module]:
    """The patch embedding and the first `count` stages (or blocks); nothing where `count` is 0 or -1."""
    return [embedding, *list(stages)[:count]] if count > 0 else []


def freeze(parts: Iterable[nn.Module]) -> None:
    """Switch parts of a network to eval mode, without gradients."""
    for part in parts:
        part.eval().requires_grad_(False)
