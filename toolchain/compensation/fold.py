"""The same function with other weights: LayerNorm affines, LayerScale and centring folded into the linear layers.

All readers of a pre-norm ViT's residual stream are LayerNorms, which take out every token's mean and multiply by a
weight per channel. The weight and the bias can move into the layers that read the norm, and the mean can be taken out
where the stream is written. What is left commutes with every rotation that keeps the vector of ones (SliceGPT,
arXiv 2401.15024, section 3.1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upvits.calib_data.errors import UserError

TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")
"""Parameters of timm's ViTs that are added to the stream, [1, n, C]."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A LayerNorm on the stream and the linear layers that read it.

    Attributes:
        norm: name of the norm.
        readers: names of the layers.
    """

    norm: str
    readers: tuple[str, ...]


def readings(model: nn.Module) -> tuple[Reading, ...]:
    """Where the blocks and the head of a ViT read the stream, in the order of the forward pass."""
    vit: Any = model
    result = []
    for index in range(len(vit.blocks)):
        block = f"blocks.{index}"
        result.append(Reading(f"{block}.norm1", (f"{block}.attn.qkv",)))
        result.append(Reading(f"{block}.norm2", (f"{block}.mlp.fc1",)))
    heads = tuple(name for name in ("head", "head_dist") if isinstance(getattr(vit, name, None), nn.Linear))
    result.append(Reading("norm" if isinstance(vit.norm, nn.LayerNorm) else "fc_norm", heads))
    return tuple(result)


def writers(model: nn.Module) -> tuple[str, ...]:
    """The layers of a ViT whose output is added to the stream (beside the tokens in `TOKENS`)."""
    vit: Any = model
    blocks = (f"blocks.{i}.{name}" for i in range(len(vit.blocks)) for name in ("attn.proj", "mlp.fc2"))
    return ("patch_embed.proj", *blocks)


def stream_can_rotate(model: nn.Module) -> str | None:
    """Why the stream of this network cannot be rotated within its timm class, or None when it can."""
    if not isinstance(model, VisionTransformer):
        return "its streams start with a LayerNorm whose weights per channel do not commute with a rotation"
    vit: Any = model
    if isinstance(vit.norm_pre, nn.LayerNorm):
        return "the norm before its blocks weights the channels of the stream, which does not commute with a rotation"
    if isinstance(vit.patch_embed.norm, nn.LayerNorm):
        return "the norm in its patch embedding weights the channels of the stream, which does not commute with one"
    if not isinstance(vit.head, nn.Linear):
        return "it has no head that could take the rotation back: its output is the stream itself"
    if isinstance(vit.norm, nn.LayerNorm) and isinstance(vit.fc_norm, nn.LayerNorm):
        return "it has two norms before its head"
    if vit.global_pool in ("max", "avgmax"):
        return "it takes the maximum of every channel over the tokens"
    for reading in readings(vit):
        norm = vit.get_submodule(reading.norm)
        if not isinstance(norm, nn.LayerNorm):
            return f"{reading.readers[0]} reads the stream without a norm"
        if norm.bias is not None and norm.bias.any():
            for reader in reading.readers:
                if vit.get_submodule(reader).bias is None:
                    return f"{reader} has no bias that could take the bias of {reading.norm}"
    return None


def require_rotatable(model: nn.Module) -> None:
    """Refuse a network whose stream cannot be rotated.

    Raises:
        UserError: says what stands in the way.
    """
    reason = stream_can_rotate(model)
    if reason is not None:
        raise UserError(
            f"The residual stream of this {type(model).__name__} cannot be rotated: {reason}.",
            why="A rotation needs layers that take it in and give it back.",
            fix="Choose channels instead; FFN units and head dims are compensated all the same.",
        )


def fold(model: nn.Module) -> nn.Module:
    """A network that computes the same, whose stream has mean zero and is read and written by plain matrices.

    All LayerNorms on the stream have weight 1 and bias 0, every LayerScale is 1, and what is written to the stream
    has mean zero over its channels.

    Args:
        model: a timm ViT, not changed; `stream_can_rotate` must give None.

    Returns:
        The same timm class and shapes, in float64.

    Raises:
        UserError: the stream of this network cannot be rotated.

    Example:
        >>> import timm, torch
        >>> dense = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        >>> image = torch.randn(1, 3, 32, 32)
        >>> torch.allclose(fold(dense)(image.double()).float(), dense(image), rtol=1e-4, atol=1e-6)
        True
    """
    require_rotatable(model)
    folded = copy.deepcopy(model).double()
    with torch.no_grad():
        fold_layer_scale(folded)
        for reading in readings(folded):
            _fold_norm(folded, reading)
        for parameter, axis in stream_axes(folded):
            parameter -= parameter.mean(dim=axis, keepdim=True)
    return folded


@torch.no_grad()
def fold_layer_scale(model: nn.Module) -> None:
    """Fold every LayerScale of a ViT into the layer before it, in place; its gamma becomes 1."""
    vit: Any = model
    for block in vit.blocks:
        for scale, writer in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
            if isinstance(scale, LayerScale):
                writer.weight *= scale.gamma.unsqueeze(1)
                if writer.bias is not None:
                    writer.bias *= scale.gamma
                scale.gamma.fill_(1)


def _fold_norm(model: nn.Module, reading: Reading) -> None:
    norm: Any = model.get_submodule(reading.norm)
    for name in reading.readers:
        reader: Any = model.get_submodule(name)
        if norm.bias is not None and reader.bias is not None:
            reader.bias += reader.weight @ norm.bias
        reader.weight *= norm.weight
    norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.fill_(0)


def stream_axes(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Every parameter of a ViT that writes to the stream, with the axis of the stream's channels."""
    for name in TOKENS:
        token = getattr(model, name, None)
        if token is not None:
            yield token, -1
    for name in writers(model):
        writer: Any = model.get_submodule(name)
        yield writer.weight, 0
        if writer.bias is not None:
            yield writer.bias, 0
