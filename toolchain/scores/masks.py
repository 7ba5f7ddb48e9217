"""Switching units of the dense network off (or measuring what that would do) without changing its code.

Masks are per image, [B, units], so that one backward pass gives the gradient of every unit for every image, and one
forward pass can remove different units from different images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upvits.toolchain.structure.groups import ChannelGroup, MaskPoint


@contextmanager
def masked(model: nn.Module, groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run `model` with the channels of some groups multiplied by masks.

    Args:
        model: the dense network.
        groups: its groups.
        masks: group name -> mask [B, group.size]; 1 keeps a unit, 0 removes it. Groups that are not named stay whole.
    """
    with ExitStack() as hooks:
        for group in groups:
            if group.name in masks:
                for point in group.masks:
                    hooks.enter_context(_hook(model.get_submodule(point.module), point, masks[group.name]))
        yield


def _hook(module: nn.Module, point: MaskPoint, mask: Tensor) -> Any:
    if point.site == "input":
        return module.register_forward_pre_hook(lambda _, args: (args[0] * _expand(mask, point, args[0]), *args[1:]))
    if point.site == "output":
        return module.register_forward_hook(lambda _, __, output: output * _expand(mask, point, output))
    norm = cast(nn.LayerNorm, module)
    return norm.register_forward_hook(
        lambda _, args, __: masked_layer_norm(norm, args[0], _expand(mask, point, args[0]))
    )


def _expand(mask: Tensor, point: MaskPoint, like: Tensor) -> Tensor:
    """The mask over the last axis of `like`, broadcast over everything between batch and channels."""
    units = mask.repeat_interleave(point.unit, dim=1)
    parts = [units if masks_part else torch.ones_like(units) for masks_part in point.pattern]
    channels = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    after = like.shape[-1] - point.start - channels.shape[1]
    if point.start or after:
        channels = F.pad(channels, (point.start, after), value=1.0)
    return channels.view(channels.shape[0], *[1] * (like.ndim - 2), channels.shape[1])


def masked_layer_norm(norm: nn.LayerNorm, x: Tensor, mask: Tensor) -> Tensor:
    """LayerNorm over the channels that the mask keeps; removed channels come out as zero.

    Args:
        norm: the dense network's norm.
        x: [..., C].
        mask: broadcastable to x.
    """
    # the mask enters each sum once, so that its derivative at 1 is the effect of removing the unit
    count = mask.sum(dim=-1, keepdim=True)
    centred = x - (x * mask).sum(dim=-1, keepdim=True) / count
    variance = (centred.square() * mask).sum(dim=-1, keepdim=True) / count
    scaled = centred * torch.rsqrt(variance + norm.eps) * norm.weight
    return (scaled if norm.bias is None else scaled + norm.bias) * mask
