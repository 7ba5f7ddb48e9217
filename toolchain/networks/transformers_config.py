"""`config.json` of transformers, said as timm's: the architecture, its arguments, the preprocessing, the labels.

Covered are ViT, DeiT, DINOv2 with and without registers, and PVTv2, as image classifiers or without a head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import UserError

_Count = Annotated[int, Field(ge=1, le=65_536)]
_Side = Annotated[int, Field(ge=1, le=4_096)]
_Stages = tuple[_Count, _Count, _Count, _Count]
_Ratio = Annotated[float, Field(gt=0, le=1_000)]
_Eps = Annotated[float, Field(gt=0, lt=1)]
_FIX = "Give the folder as `save_pretrained` of transformers wrote it."

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Common(_Document):
    architectures: tuple[Annotated[str, Field(max_length=200)], ...] = ()
    id2label: dict[str, Annotated[str, Field(max_length=1_000)]] = {}
    num_channels: Annotated[int, Field(ge=1, le=64)] = 3
    hidden_act: Annotated[str, Field(max_length=100)] = "gelu"
    qkv_bias: bool = True

    @property
    def architecture(self) -> str:
        """The class that was saved."""
        return self.architectures[0] if self.architectures else ""

    @property
    def has_head(self) -> bool:
        """Whether it classifies."""
        return "ForImageClassification" in self.architecture


class _Vit(_Common):
    model_type: Literal["vit", "deit", "dinov2", "dinov2_with_registers"]
    hidden_size: _Count = 768
    num_hidden_layers: Annotated[int, Field(ge=1, le=1_000)] = 12
    num_attention_heads: _Count = 12
    intermediate_size: _Count = 3072
    mlp_ratio: _Ratio = 4
    image_size: _Side | tuple[_Side, _Side] = 224
    patch_size: _Side | tuple[_Side, _Side] = 16
    num_register_tokens: Annotated[int, Field(ge=0, le=1_000)] = 4
    layerscale_value: float = 1.0
    layer_norm_eps: _Eps = 1e-12
    use_swiglu_ffn: bool = False

    @property
    def is_dino(self) -> bool:
        return self.model_type.startswith("dinov2")


class _Pvt(_Common):
    model_type: Literal["pvt_v2"]
    image_size: _Side | tuple[_Side, _Side] | dict[str, _Side] = 224
    depths: _Stages = (2, 2, 2, 2)
    hidden_sizes: _Stages = (32, 64, 160, 256)
    num_attention_heads: _Stages = (1, 2, 5, 8)
    sr_ratios: _Stages = (8, 4, 2, 1)
    mlp_ratios: tuple[_Ratio, _Ratio, _Ratio, _Ratio] = (8, 8, 4, 4)
    linear_attention: bool = False
    layer_norm_eps: _Eps = 1e-6


class _Kind(_Document):
    model_type: Annotated[str, Field(max_length=200)]
    architecture: JsonValue = None
    """timm's; transformers has none."""


class _Preprocessor(_Document):
    """Of `preprocessor_config.json`."""

    do_normalize: bool = True
    do_center_crop: bool = False
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    resample: int | None = None
    size: dict[str, int] | int | None = None
    crop_size: dict[str, int] | int | None = None


def is_transformers(folder: Path) -> bool:
    """Whether the `config.json` of a folder is one of transformers."""
    place = folder / "config.json"
    if not place.is_file():
        return False
    try:
        kind = read_document(place, _Kind, fix=_FIX)
    except UserError:
        return False  # read as timm's, which says what is wrong
    return kind.architecture is None


def timm_config(folder: Path) -> str:
    """The same folder's configuration in the layout of timm, as JSON.

    Raises:
        UserError: the network is of another kind, or timm has none that computes the same.
    """
    place = folder / "config.json"
    kind = read_document(place, _Kind, fix=_FIX).model_type
    config: _Vit | _Pvt
    if kind == "pvt_v2":
        pvt = read_document(place, _Pvt, fix=_FIX)
        architecture = "pvt_v2_b2_li" if pvt.linear_attention else "pvt_v2_b0"
        arguments, config = _pvt_arguments(pvt), pvt
        size = pvt.image_size if not isinstance(pvt.image_size, dict) else max(pvt.image_size.values())
    elif kind in ("vit", "deit", "dinov2", "dinov2_with_registers"):
        vit = read_document(place, _Vit, fix=_FIX)
        architecture, arguments, config, size = _vit_architecture(vit), _vit_arguments(vit), vit, vit.image_size
    else:
        raise UserError(
            f"{folder} holds a {kind[:100]!r} of transformers, which cannot be pruned here.",
            fix="Supported are vit, deit, dinov2, dinov2_with_registers and pvt_v2.",
        )
    sides = (size, size) if isinstance(size, int) else size
    labels = [config.id2label.get(str(index), "") for index in range(len(config.id2label))]
    generic = all(label == f"LABEL_{index}" for index, label in enumerate(labels))
    return json.dumps(
        {
            "architecture": architecture,
            "num_classes": len(labels) if config.has_head else 0,
            "model_args": {**arguments, **_common_arguments(config, place)},
            "pretrained_cfg": {**_preprocess(folder, config.num_channels, sides)},
            "norm_eps": config.layer_norm_eps,
            "layout": "transformers",
            **({} if generic or not config.has_head or not all(labels) else {"label_names": labels}),
        }
    )


def _common_arguments(config: _Common, place: Path) -> dict[str, Any]:
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{place}: the activation {config.hidden_act[:100]!r} has no counterpart in timm.", fix="Another network."
        )
    act = {} if isinstance(config, _Pvt) else {"act_layer": ACTIVATIONS[config.hidden_act]}
    if isinstance(config, _Pvt) and config.hidden_act != "gelu":
        raise UserError(f"{place}: timm's PVTv2 has gelu, not {config.hidden_act[:100]!r}.", fix="Another network.")
    return {"in_chans": config.num_channels, "qkv_bias": config.qkv_bias, **act}


def _vit_architecture(config: _Vit) -> str:
    if config.use_swiglu_ffn:
        raise UserError("This DINOv2 has gated MLPs (swiglu), which cannot be pruned.", fix="Take its S, B or L size.")
    if config.is_dino and config.has_head:
        raise UserError(
            "The classifier of transformers' DINOv2 reads the class token and the mean of all patches side by side.",
            why="timm's ViT has no such head.",
            fix="Save the network without it (`model.dinov2.save_pretrained(FOLDER)`) and fit a head to that.",
        )
    if config.architecture == "DeiTForImageClassificationWithTeacher":
        return "deit_tiny_distilled_patch16_224"
    return "vit_base_patch16_224"


def _vit_arguments(config: _Vit) -> dict[str, Any]:
    width = config.hidden_size
    hidden = int(width * config.mlp_ratio) if config.is_dino else config.intermediate_size
    exact = int(width * (hidden / width)) == hidden
    arguments: dict[str, Any] = {
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": hidden / width if exact else (hidden + 0.5) / width,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
    }
    if config.is_dino:
        arguments["init_values"] = config.layerscale_value
    if config.model_type == "dinov2_with_registers":
        arguments |= {"reg_tokens": config.num_register_tokens, "no_embed_class": True}
    if config.model_type == "deit" and config.architecture != "DeiTForImageClassificationWithTeacher":
        arguments["reg_tokens"] = 1  # the distillation token, which this head does not read
    return arguments


def _pvt_arguments(config: _Pvt) -> dict[str, Any]:
    return {
        "embed_dims": config.hidden_sizes,
        "depths": config.depths,
        "num_heads": config.num_attention_heads,
        "sr_ratios": config.sr_ratios,
        "mlp_ratios": config.mlp_ratios,
    }


def _preprocess(folder: Path, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """Entries of timm's `pretrained_cfg`; of a folder without `preprocessor_config.json` only the size."""
    place = folder / "preprocessor_config.json"
    entries: dict[str, Any] = {"input_size": (channels, *size)}
    if not place.exists():
        return entries
    given = read_document(place, _Preprocessor, fix=_FIX)
    if given.image_mean is not None and given.image_std is not None and given.do_normalize:
        entries |= {"mean": given.image_mean, "std": given.image_std}
    elif not given.do_normalize:
        entries |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    if given.resample in RESAMPLING:
        entries["interpolation"] = RESAMPLING[given.resample]
    resized, cropped = _side(given.size), _side(given.crop_size)
    if given.do_center_crop and resized and cropped:
        both = isinstance(given.size, dict) and {"height", "width"} <= given.size.keys()  # whatever the picture's shape
        entries |= {"crop_pct": min(cropped / resized, 1.0), "crop_mode": "squash" if both else "center"}
    else:  # the whole picture, not its middle
        entries |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return entries


def _side(size: dict[str, int] | int | None) -> int | None:
    """The shorter side of a size."""
    if isinstance(size, dict):
        sides = [value for key, value in size.items() if key in ("shortest_edge", "height", "width") and value > 0]
        return min(sides) if sides else None
    return size
