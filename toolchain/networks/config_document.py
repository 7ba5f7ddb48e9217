"""`config.json` of a model folder: what a network is built from.

Folders travel between people, so the file is data and nothing else: the architecture is one of timm's supported names,
and only the arguments below reach timm. timm itself would follow others to further files (`checkpoint_path`,
`pretrained_cfg`) or to the network (`pretrained`, `hf-hub:` names).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from upvits.calib_data.documents import parse_document, read_document
from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import Interpolation
from upvits.toolchain.networks.catalogue import MODULES
from upvits.toolchain.networks.transformers_config import is_transformers, timm_config

_Count = Annotated[int, Field(ge=1, le=65_536)]
_Depth = Annotated[int, Field(ge=1, le=1_000)]
_Side = Annotated[int, Field(ge=1, le=4_096)]
_Channels = Annotated[int, Field(ge=1, le=64)]
_Classes = Annotated[int, Field(ge=0, le=1_000_000)]
_Ratio = Annotated[float, Field(gt=0, le=1_000, allow_inf_nan=False)]
_Rate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=1_000)]
_Stages = tuple[_Count, _Count, _Count, _Count]
_Activation = Literal["gelu", "gelu_erf", "gelu_tanh", "quick_gelu", "relu", "silu", "swish"]


def _by_index(names: Any) -> Any:
    """timm also writes names by index; those of only some classes are none."""
    if not isinstance(names, dict):
        return tuple(names) if isinstance(names, list) else names
    ordered = tuple(names.get(str(index)) for index in range(len(names)))
    return None if None in ordered else ordered


_Labels = Annotated[
    Annotated[tuple[_Text, ...], Field(max_length=1_000_000)] | None,
    BeforeValidator(_by_index),
    Field(validation_alias=AliasChoices("label_names", "labels")),
]


class _Arguments(BaseModel):
    """timm arguments that every family takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_chans: _Channels | None = None
    num_classes: _Classes | None = None
    global_pool: Literal["", "avg", "token", "max", "avgmax"] | None = None
    qkv_bias: bool | None = None
    drop_rate: _Rate | None = None
    proj_drop_rate: _Rate | None = None
    attn_drop_rate: _Rate | None = None
    drop_path_rate: _Rate | None = None


class VitArguments(_Arguments):
    """Of timm's VisionTransformer."""

    img_size: _Side | tuple[_Side, _Side] | None = None
    patch_size: _Side | tuple[_Side, _Side] | None = None
    embed_dim: _Count | None = None
    depth: _Depth | None = None
    num_heads: _Count | None = None
    mlp_ratio: _Ratio | None = None
    init_values: _Number | None = None
    class_token: bool | None = None
    reg_tokens: Annotated[int, Field(ge=0, le=1_000)] | None = None
    no_embed_class: bool | None = None
    pre_norm: bool | None = None
    final_norm: bool | None = None
    fc_norm: bool | None = None
    qk_norm: bool | None = None
    pos_embed: Literal["learn", "", "none"] | None = None
    dynamic_img_size: bool | None = None
    dynamic_img_pad: bool | None = None
    pos_drop_rate: _Rate | None = None
    patch_drop_rate: _Rate | None = None
    act_layer: _Activation | None = None
    norm_layer: Literal["layernorm"] | None = None
    proj_bias: bool | None = None
    weight_init: Literal["", "skip", "reset", "jax", "jax_nlhb", "moco"] | None = None


class PvtArguments(_Arguments):
    """Of timm's PyramidVisionTransformerV2; one value per stage."""

    depths: tuple[_Depth, _Depth, _Depth, _Depth] | None = None
    embed_dims: _Stages | None = None
    num_heads: _Stages | None = None
    sr_ratios: _Stages | None = None
    mlp_ratios: tuple[_Ratio, _Ratio, _Ratio, _Ratio] | None = None
    linear: bool | None = None


class PreprocessEntries(BaseModel):
    """The entries of timm's `pretrained_cfg` that are used; addresses, licences and the like are left out."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    input_size: tuple[_Channels, _Side, _Side] | None = None
    fixed_input_size: bool | None = None
    interpolation: Interpolation | None = None
    crop_pct: Annotated[float, Field(ge=0.1, le=4, allow_inf_nan=False)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    mean: Annotated[tuple[_Number, ...], Field(min_length=1, max_length=64)] | None = None
    std: Annotated[tuple[_Spread, ...], Field(min_length=1, max_length=64)] | None = None
    first_conv: _Text | tuple[_Text, ...] | None = None
    classifier: _Text | tuple[_Text, ...] | None = None
    num_classes: _Classes | None = None
    label_names: _Labels = None

    @property
    def given(self) -> dict[str, Any]:
        """By name, without those that the file does not have."""
        return self.model_dump(exclude_unset=True)


class WidthEntries(BaseModel):
    """Sizes of the groups of a network that timm alone cannot build; see `toolchain.structure.groups.Widths`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: dict[_Text, _Count]
    num_heads: dict[_Text, _Count] = {}


class UpvitsEntries(BaseModel):
    """What this tool adds to timm's layout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    widths: WidthEntries


class ModelConfig(BaseModel):
    """The whole file; what `model_args` may hold depends on the architecture's family."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    architecture: _Text
    num_classes: _Classes | None = None
    model_args: dict[_Text, JsonValue] = {}
    global_pool: _Text | None = None
    pretrained_cfg: PreprocessEntries = PreprocessEntries()
    label_names: _Labels = None
    norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of every LayerNorm, where it is not what timm builds; timm alone does not read it."""
    layout: Literal["transformers"] | None = None
    """The layout that the weights came in, where it was not timm's."""
    upvits: UpvitsEntries | None = None


ARGUMENTS: dict[str, type[_Arguments]] = {"vit": VitArguments, "pvt_v2": PvtArguments}
_EXPECTED = "Expected are config.json and model.safetensors, as `upvits.save` or timm write them."


def read_config(folder: Path) -> ModelConfig:
    """The `config.json` of a model folder; that of transformers is said as timm's.

    Raises:
        UserError: there is none, or it is not valid; names the entry.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no model folder.", fix=_EXPECTED)
    if is_transformers(folder):
        return parse_document(timm_config(folder), str(folder / "config.json"), ModelConfig, fix=_EXPECTED)
    config = read_document(folder / "config.json", ModelConfig, fix=_EXPECTED)
    if "pretrained_cfg" in config.model_fields_set:
        return config
    entries = read_document(folder / "config.json", PreprocessEntries, fix=_EXPECTED)  # as timm wrote it at first
    return config.model_copy(update={"pretrained_cfg": entries})


def has_config(folder: Path) -> bool:
    """Whether a folder says what network it holds."""
    return (folder / "config.json").exists()


def config_from(structure: Mapping[str, Any]) -> ModelConfig:
    """The same from values that stand in another document, such as a detector's."""
    return parse_document(json.dumps(structure), "The structure of the network", ModelConfig, fix=_EXPECTED)


def arguments_of(config: ModelConfig) -> dict[str, Any]:
    """What timm is called with beside the architecture.

    Raises:
        UserError: the architecture is of no family, or has no such argument.
    """
    family = family_name(config.architecture)
    if family is None:
        raise UserError(
            f"config.json: {config.architecture[:100]!r} is none of timm's architectures that can be pruned.",
            fix="`upvits-deploy models` lists them.",
        )
    arguments = parse_document(
        json.dumps(config.model_args), "config.json: model_args", ARGUMENTS[family], fix=_EXPECTED
    ).model_dump(exclude_unset=True)
    return (
        _beside_arguments(config, family)
        | arguments
        | ({} if config.num_classes is None else {"num_classes": config.num_classes})
    )


def _beside_arguments(config: ModelConfig, family: str) -> dict[str, Any]:
    """What timm takes from elsewhere in the file where `model_args` does not say it: its older folders have none."""
    entries = config.pretrained_cfg
    result: dict[str, Any] = {}
    if entries.num_classes is not None:
        result["num_classes"] = entries.num_classes
    if config.global_pool in ("avg", "token", "max", "avgmax"):
        result["global_pool"] = config.global_pool
    if entries.input_size is not None:
        result["in_chans"] = entries.input_size[0]
        if entries.fixed_input_size and family == "vit":
            result["img_size"] = entries.input_size[1:]
    return result


@cache
def family_name(architecture: str) -> str | None:
    """The family of a timm architecture, by name; None where no family has it."""
    for family, modules in MODULES.items():
        if any(architecture in timm.list_models(module=module) for module in modules):
            return family
    return None
