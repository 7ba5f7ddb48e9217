"""Networks in the layout of transformers: `config.json`, tensors under its names, `preprocessor_config.json`.

The counterpart of `transformers_config.py` and `layouts.py`. What transformers cannot express is refused, and what is
written is read back by the caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import family_of
from upvits.toolchain.networks.layouts import State
from upvits.toolchain.networks.transformers_config import ACTIVATIONS, RESAMPLING

_COMMON = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^norm\.", "layernorm."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
)
_VIT = (
    *_COMMON,
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^(reg|dist)_token$", "embeddings.distillation_token"),
)
_DINO = (
    *_COMMON,
    (r"^blocks\.(\d+)\.(mlp|norm1|norm2)\.", r"encoder.layer.\1.\2."),
    (r"^blocks\.(\d+)\.ls(\d)\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"^reg_token$", "embeddings.register_tokens"),
)
_PVT = (
    (r"^patch_embed\.proj\.", "encoder.layers.0.patch_embedding.proj."),
    (r"^patch_embed\.norm\.", "encoder.layers.0.patch_embedding.layer_norm."),
    (r"^stages\.(\d+)\.downsample\.proj\.", r"encoder.layers.\1.patch_embedding.proj."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"encoder.layers.\1.patch_embedding.layer_norm."),
    (r"^stages\.(\d+)\.norm\.", r"encoder.layers.\1.layer_norm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.blocks.\2.layer_norm_\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.sr\.", r"encoder.layers.\1.blocks.\2.attention.spatial_reduction."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.norm\.", r"encoder.layers.\1.blocks.\2.attention.layer_norm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.(\w+)\.", r"encoder.layers.\1.blocks.\2.attention.\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"encoder.layers.\1.blocks.\2.mlp.dense\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.dwconv\.", r"encoder.layers.\1.blocks.\2.mlp.dwconv.dwconv."),
)
_RULES = {"vit": _VIT, "deit": _VIT, "dinov2": _DINO, "dinov2_with_registers": _DINO, "pvt_v2": _PVT}
_CLASSES = {
    "vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters", "pvt_v2": "PvtV2"
}  # fmt: skip
_HEADS = {"head": "classifier", "head_dist": "distillation_classifier"}


def transformers_config(model: nn.Module, labels: tuple[str, ...] | None, data: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of transformers for a network.

    Args:
        model: as timm builds it.
        labels: names of its classes, in the order of the logits.
        data: how images are prepared, by the names of timm.

    Raises:
        UserError: transformers has no network that computes the same; says why.
    """
    kind = _kind(model)
    names = labels or tuple(f"LABEL_{index}" for index in range(model.num_classes))  # type: ignore[arg-type]
    channels, height, width = data["input_size"]
    size = height if height == width else [height, width]
    eps = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) != 1:
        raise _inexpressible("its norms add different numbers to the variance", "transformers has one for all")
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return {
        "architectures": [_class_name(model, kind)],
        "model_type": kind,
        "image_size": size,
        "num_channels": channels,
        "layer_norm_eps": eps.pop(),
        "torch_dtype": "float32",
        **(_pvt_entries(model) if kind == "pvt_v2" else _vit_entries(model, kind)),
        **(classes if names else {}),
    }


def _kind(model: nn.Module) -> str:
    """The `model_type`."""
    vit: Any = model
    if not hasattr(vit, "blocks"):
        return "pvt_v2"
    variant = family_of(model).variant_args(model)
    if variant["init_values"] is not None:
        return "dinov2_with_registers" if variant["reg_tokens"] else "dinov2"
    return "deit" if variant["reg_tokens"] == 1 or hasattr(vit, "dist_token") else "vit"


def _class_name(model: nn.Module, kind: str) -> str:
    if model.num_classes == 0:
        return f"{_CLASSES[kind]}Model"
    return f"{_CLASSES[kind]}ForImageClassification{'WithTeacher' if hasattr(model, 'head_dist') else ''}"


def _inexpressible(what: str, why: str) -> UserError:
    return UserError(
        f"This network has no form in transformers: {what}.",
        why=f"There, {why}.",
        fix="Save it in timm's layout; `upvits.load` reads any, timm those whose widths are uniform.",
    )


def _uniform(model: nn.Module) -> dict[str, Any]:
    widths = family_of(model).uniform_args(model)
    if widths is None:
        raise _inexpressible("its widths differ from block to block", "one number holds for all blocks of a stage")
    return widths


def _vit_entries(model: nn.Module, kind: str) -> dict[str, Any]:
    vit: Any = model
    widths, variant = _uniform(model), family_of(model).variant_args(model)
    is_dino, reg_tokens = kind.startswith("dinov2"), variant["reg_tokens"]
    wrong = {
        "it has no class token": not variant["class_token"],
        "it pools by average": vit.global_pool != "token",
        "it has a norm before its blocks": variant["pre_norm"],
        "its last norm stands elsewhere": variant["fc_norm"] or not variant["final_norm"],
        "its attention ends without a bias": not variant["proj_bias"],
        "it has no position embedding": vit.pos_embed is None,
        "it has a classifier": is_dino and vit.num_classes > 0,
        "it has registers": reg_tokens > 0 and not (is_dino or kind == "deit"),
        "its registers have a position": reg_tokens > 0 and is_dino and not vit.no_embed_class,
        "its first tokens have no position": vit.no_embed_class and not (reg_tokens > 0 and is_dino),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise _inexpressible(what, f"no {_CLASSES[kind]} is built so")
    hidden, patch = vit.blocks[0].mlp.fc1.out_features, vit.patch_embed.patch_size
    entries: dict[str, Any] = {
        "hidden_size": widths["embed_dim"],
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": widths["num_heads"],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "hidden_act": _activation(variant["act_layer"]),
        "qkv_bias": variant["qkv_bias"],
    }
    if not is_dino:
        return {**entries, "intermediate_size": hidden}
    entries |= {"mlp_ratio": _ratio(hidden, widths["embed_dim"]), "layerscale_value": 1.0, "use_swiglu_ffn": False}
    return {**entries, **({"num_register_tokens": reg_tokens} if reg_tokens else {})}


def _pvt_entries(model: nn.Module) -> dict[str, Any]:
    pvt: Any = model
    widths, variant = _uniform(model), family_of(model).variant_args(model)
    hidden = [stage.blocks[0].mlp.fc1.out_features for stage in pvt.stages]
    return {
        "hidden_sizes": widths["embed_dims"],
        "depths": list(pvt.depths),
        "num_attention_heads": widths["num_heads"],
        "sr_ratios": variant.get("sr_ratios", [8, 4, 2, 1]),
        "mlp_ratios": [_ratio(units, width) for units, width in zip(hidden, widths["embed_dims"], strict=True)],
        "linear_attention": variant["linear"],
        "hidden_act": "gelu",
        "qkv_bias": variant["qkv_bias"],
    }


def _ratio(hidden: int, width: int) -> int:
    """How many times as wide the middle of an MLP is.

    Raises:
        UserError: it is no whole number, which transformers refuses.
    """
    if hidden % width:
        raise _inexpressible(
            f"an MLP has {hidden} units at width {width}", "they are a whole multiple of the width in this architecture"
        )
    return hidden // width


def _activation(name: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def transformers_state(model: nn.Module) -> State:
    """The tensors of a network under the names of transformers; for a network that `transformers_config` takes."""
    kind = _kind(model)
    body: State = {}
    result: State = {}
    for name, tensor in model.state_dict().items():
        part, _, leaf = name.rpartition(".")
        if part in _HEADS:
            distilled = part == "head" and hasattr(model, "head_dist")
            result[f"{'cls_classifier' if distilled else _HEADS[part]}.{leaf}"] = tensor
        else:
            body |= _split(name, tensor)
    if kind.startswith("dinov2"):
        if kind == "dinov2_with_registers":  # here the class token has a position, too
            body["pos_embed"] = torch.cat([torch.zeros_like(body["cls_token"]), body["pos_embed"]], dim=1)
        body["embeddings.mask_token"] = torch.zeros_like(body["cls_token"][:, 0])
    prefix = "" if model.num_classes == 0 else f"{kind}."
    for name, tensor in body.items():
        result[prefix + _renamed(name, kind)] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in result.items()}


def _split(name: str, tensor: Tensor) -> State:
    """Queries, keys and values by themselves."""
    match = re.fullmatch(r"(.+\.attn)\.(qkv|kv|q)\.(weight|bias)", name)
    if match is None:
        return {name: tensor}
    start, parts, leaf = match.groups()
    full = {"q": "query", "k": "key", "v": "value"}
    return {f"{start}.{full[part]}.{leaf}": piece for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True)}


def _renamed(name: str, kind: str) -> str:
    for pattern, replacement in _RULES[kind]:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def preprocessor_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """`preprocessor_config.json` of transformers for the way images are prepared.

    Raises:
        UserError: transformers prepares none in this way.
    """
    _, height, width = data["input_size"]
    large = {"height": math.floor(height / data["crop_pct"]), "width": math.floor(width / data["crop_pct"])}
    if data["crop_mode"] not in ("center", "squash") or data["crop_pct"] > 1:
        raise _inexpressible(f"its images are cropped as {data['crop_mode']!r}", "images are cropped in the middle")
    if data["crop_mode"] == "center" and height != width:
        raise _inexpressible("its images are no squares and cropped in the middle", "the shorter side is resized")
    squashed = data["crop_mode"] == "squash"
    return {
        "image_processor_type": "DeiTImageProcessor" if squashed else "BitImageProcessor",
        "do_resize": True,
        "size": large if squashed else {"shortest_edge": large["height"]},
        "do_center_crop": not squashed or data["crop_pct"] < 1,
        "crop_size": {"height": height, "width": width},
        "resample": next(number for number, name in RESAMPLING.items() if name == data["interpolation"]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "do_convert_rgb": True,
    }
