"""Names of tensors in the layouts that people have, put into timm's: official PVTv2, DINOv2, MAE, DeiT and CLIP files
by timm's own filters, those of transformers by the tables here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

ANCHORS = {
    "patch_embed.proj.weight": "timm",
    "patch_embed1.proj.weight": "official PVTv2",
    "visual.conv1.weight": "OpenCLIP",
    "embeddings.patch_embeddings.projection.weight": "transformers",
    "encoder.layers.0.patch_embedding.proj.weight": "transformers",
}
"""A tensor that every network in a layout has; what stands before its name stands before all names."""

_VIT = (
    (r"^embeddings\.(cls_token|register_tokens|mask_token)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)[a-z]+\.", r"blocks.\1.attn.\2."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.(\d+)\.(mlp|norm1|norm2)\.", r"blocks.\1.\2."),
    # in memory, transformers 5 has other names than in the files that it saves
    (r"^(?:encoder\.)?layers?\.(\d+)\.attention\.(q|k|v)_proj\.", r"blocks.\1.attn.\2."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^layers\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"^layernorm\.", "norm."),
)
_PVT = (
    (r"^encoder\.layers\.0\.patch_embedding\.proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.0\.patch_embedding\.layer_norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.(\d+)\.patch_embedding\.proj\.", r"stages.\1.downsample.proj."),
    (r"^encoder\.layers\.(\d+)\.patch_embedding\.layer_norm\.", r"stages.\1.downsample.norm."),
    (r"^encoder\.layers\.(\d+)\.layer_norm\.", r"stages.\1.norm."),
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.layer_norm_(\d)\.", r"stages.\1.blocks.\2.norm\3."),
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.spatial_reduction\.", r"stages.\1.blocks.\2.attn.sr."),
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.layer_norm\.", r"stages.\1.blocks.\2.attn.norm."),
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.proj\.", r"stages.\1.blocks.\2.attn.proj."),
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.attention\.(q|k|v)[a-z]+\.", r"stages.\1.blocks.\2.attn.\3."),
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.dense(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.dwconv\.dwconv\.", r"stages.\1.blocks.\2.mlp.dwconv."),
)
_HEADS = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
"""Heads of transformers, which stand beside the network."""


def in_timm_names(state: State, layout: str, model: nn.Module) -> State:
    """The tensors of a network under timm's names; what no rule knows keeps its name.

    Args:
        state: by name, without what wrappers put before.
        layout: a value of `ANCHORS`.
        model: a network of the architecture; only its structure matters.
    """
    if layout == "transformers":
        return _from_transformers(state)
    dropped = {name: tensor for name, tensor in state.items() if name == "mask_token" or "pre_logits" in name}
    return {**_by_timm(_without_chunks(state), model), **dropped}


class _AnyLength:
    """Differs from no number: the length of a position embedding that is not to be resampled."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


def _by_timm(state: State, model: nn.Module) -> State:
    """timm's filter of the architecture, without its resampling: sizes are settled later."""
    filters: Callable[..., State] | None = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filters is None:
        return state
    if "stages" in dict(model.named_children()):
        return filters(dict(state), model)
    weight = state.get("patch_embed.proj.weight", state.get("visual.conv1.weight"))
    assert weight is not None
    vit: Any = model
    standin = SimpleNamespace(
        patch_embed=SimpleNamespace(
            proj=weight if weight.ndim == 4 else vit.patch_embed.proj, grid_size=vit.patch_embed.grid_size
        ),
        pos_embed=None,
        head=vit.head,
    )
    if weight.ndim == 4:
        standin.patch_embed.proj = SimpleNamespace(weight=weight)
    try:
        return filters(dict(state), standin, adapt_layer_scale=True)
    except AttributeError:  # timm 1.0.24 asks for its length before it resamples
        standin.pos_embed = SimpleNamespace(shape=(1, _AnyLength()))
        return filters(dict(state), standin, adapt_layer_scale=True)


def _without_chunks(state: State) -> State:
    """DINOv2's training keeps blocks in chunks: `blocks.CHUNK.INDEX.`"""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in state.items()}


def _from_transformers(state: State) -> State:
    rules = _PVT if any(name.startswith("encoder.layers.") for name in state) else _VIT
    renamed: State = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[name] = tensor
    if "register_tokens" in renamed and "pos_embed" in renamed and "cls_token" in renamed:
        position = renamed["pos_embed"]
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"], renamed["pos_embed"] = renamed["cls_token"] + position[:, :1], position[:, 1:]
    return _fused(renamed)


def _fused(state: State) -> State:
    """Queries, keys and values in the tensors that timm keeps them in: `qkv` in ViT, `q` and `kv` in PVTv2."""
    result: State = {}
    for name, tensor in state.items():
        match = re.match(r"(.+\.attn)\.(q|k|v)\.(weight|bias)$", name)
        if match is None:
            result[name] = tensor
            continue
        start, part, kind = match.groups()
        fused = ("q", "k", "v") if start.startswith("blocks.") else ("k", "v")
        parts = [state.get(f"{start}.{one}.{kind}") for one in fused]
        if part not in fused or any(one is None for one in parts):
            result[name] = tensor
        elif part == fused[0]:
            result[f"{start}.{''.join(fused)}.{kind}"] = torch.cat([one for one in parts if one is not None])
    return result


def with_heads(state: State, outside: State, layout: str) -> tuple[State, State]:
    """Move the classifier of transformers, or the projection of OpenCLIP, to where timm has it.

    Returns:
        The tensors of the network, and those that stay beside it.
    """
    state, outside = dict(state), dict(outside)
    if layout == "transformers":
        for theirs, ours in _HEADS.items():
            for kind in ("weight", "bias"):
                if f"{theirs}.{kind}" in outside:
                    state[f"{ours}.{kind}"] = outside.pop(f"{theirs}.{kind}")
        if "dist_token" in state and "head_dist.weight" not in state:
            state["reg_token"] = state.pop("dist_token")  # without a head of its own it is a register
    elif "visual.head.proj.weight" in outside and "head.weight" not in state:
        weight = outside.pop("visual.head.proj.weight")
        state |= {"head.weight": weight, "head.bias": torch.zeros(len(weight))}
    return state, outside


def linear_head(state: Mapping[str, Tensor], outside: Mapping[str, Tensor], width: int) -> str | None:
    """The name of the one linear layer that can only be the classifier: `head.1`, or `classifier` beside the network.

    Args:
        state: tensors of the network, under timm's names.
        outside: tensors beside it.
        width: of the features that a classifier reads.
    """
    found = [
        name.removesuffix(".weight")
        for name, tensor in (*state.items(), *outside.items())
        if tensor.ndim == 2
        and tensor.shape[1] == width
        and re.fullmatch(
            r"(.*\.)?(head|fc|classifier|cls_head|linear|heads|\d+)(\.(\d+|fc|head|linear))?\.weight", name
        )
        and not re.match(r"blocks\.|stages\.", name)
    ]
    return found[0] if len(found) == 1 else None
