"""What tensor names alone do not decide: arguments of the network, the size of its images, how they are prepared.

Each is settled by evidence, in this order: what the user said, what the checkpoint says, its tensors, timm's
configuration.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from upvits.calib_data.documents import parse_document
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.config_document import ARGUMENTS, PreprocessEntries, family_name
from upvits.toolchain.networks.layouts import State
from upvits.toolchain.networks.readings import Fit, Reading, fitted
from upvits.toolchain.networks.said import Said
from upvits.toolchain.structure.timm_config import config_of, update_config

Size = tuple[int, int]
"""Height and width in pixels."""

OPTIONS = "the options"
SQUARE = "its position embedding, taken as a square"

_POOLINGS = ("token", "avg")
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
"""Of networks whose tensors are alike, by the names of their classes."""

MEANINGS = {"global_pool": "how features are pooled", "act_layer": "which activation the network has"}
_FIELDS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asks for beside a name and weights; None and empty: what is found.

    Attributes:
        num_classes: classes of the head.
        image_size: height and width in pixels.
        model_args: timm arguments of the architecture.
        preprocess: of mean, std, interpolation, crop_pct and crop_mode, those that replace what is found.
    """

    num_classes: int | None
    image_size: Size | None
    model_args: Mapping[str, Any]
    preprocess: Mapping[str, Any]


def checked_arguments(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for timm, of the closed list of the family.

    Raises:
        UserError: the family has no such argument, or the value is of another kind.
    """
    family = family_name(architecture.partition(".")[0])
    if family is None or not arguments:
        return {}
    known = ", ".join(sorted(ARGUMENTS[family].model_fields))
    return parse_document(
        json.dumps(dict(arguments), default=str),
        "`model_args=`",
        ARGUMENTS[family],
        fix=f"Arguments of {architecture} are {known}.",
    ).model_dump(exclude_unset=True)


def checked_preprocess(entries: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Entries of a preprocessing that a user gave.

    Raises:
        UserError: one is unknown or of another kind, or a mean or std is for other channels.
    """
    unknown = sorted(entries.keys() - {*_FIELDS})
    if unknown:
        raise UserError(f"`preprocess=` has no entry {unknown[0]!r}.", fix=f"Entries are {', '.join(_FIELDS)}.")
    given = parse_document(
        json.dumps(dict(entries), default=str),
        "The preprocessing",
        PreprocessEntries,
        fix="`mean=` and `std=` are one number per channel, `crop_pct=` a share such as 0.9, `interpolation=` one of "
        "bilinear, bicubic, nearest and lanczos.",
    ).given
    for name in ("mean", "std"):
        if name in given and len(given[name]) not in (1, channels):
            raise UserError(
                f"`{name}=` has {len(given[name])} numbers, but the network reads {channels} channels.",
                fix=f"Give one number per channel, or one for all: {name}={','.join(['0.5'] * channels)}.",
            )
        if name in given:
            given[name] = given[name] * (channels // len(given[name]))
    return given


def said_arguments(architecture: str, said: Said) -> dict[str, Any]:
    """The arguments that a checkpoint names, where the architecture has them."""
    result: dict[str, Any] = {}
    for name, value in said.model_args.items():
        try:
            result |= checked_arguments(architecture, {name: value})
        except (UserError, TypeError, ValueError):  # json: not a plain value
            continue
    return {name: value for name, value in result.items() if not name.endswith("_rate")}


def pooling(arguments: Mapping[str, Any], state: State, model: nn.Module) -> dict[str, Any]:
    """How features are pooled, as far as tensors tell: `fc_norm` instead of `norm` is timm's average pooling, and
    average pooling beside `norm` has no `fc_norm`."""
    if "patch_embed" not in dict(model.named_children()) or "pos_embed" not in state:
        return {}
    has_fc_norm, has_norm = "fc_norm.weight" in state, "norm.weight" in state
    if "global_pool" not in arguments and has_fc_norm and not has_norm and getattr(model, "global_pool", "") == "token":
        return {"global_pool": "avg"}
    if arguments.get("global_pool") == "avg" and has_norm and not has_fc_norm and "fc_norm" not in arguments:
        return {"fc_norm": False}
    return {}


def untold(arguments: Mapping[str, Any], state: State, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Arguments that neither the user nor the file gives, each with the values that fit the tensors alike: pooling and
    activation of ViTs. The first value is the one of `model`.
    """
    vit: Any = model
    if "blocks" not in dict(model.named_children()):
        return {}
    result: dict[str, tuple[str, ...]] = {}
    both_fit = {"cls_token", "norm.weight"} <= state.keys() and not {"fc_norm.weight", "dist_token"} & state.keys()
    if both_fit and "global_pool" not in arguments and vit.global_pool in _POOLINGS:
        result["global_pool"] = tuple(sorted(_POOLINGS, key=lambda value: value != vit.global_pool))
    activation = _ACTIVATIONS.get(type(vit.blocks[0].mlp.act).__name__)
    if "act_layer" not in arguments and activation is not None:
        result["act_layer"] = tuple(sorted(_ACTIVATIONS.values(), key=lambda value: value != activation))
    return result


def assumed(arguments: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What is to be said about arguments that nothing tells."""
    if not arguments:
        return ()
    taken = " and ".join(f"{name}={values[0]}" for name, values in arguments.items())
    others = " or ".join(f"{name}={value}" for name, values in arguments.items() for value in values[1:])
    what = " and ".join(MEANINGS[name] for name in arguments)
    return (
        f"The file does not say {what}. Assumed is what timm takes for this name: {taken}. For other networks give the "
        f"argument {others}.",
    )


def other_sizes(model: nn.Module) -> tuple[Size, ...]:
    """Heights and widths, other than the square that it is, whose patches are as many as those of a ViT; sides differ
    by a factor of eight at most."""
    embedding: Any = model.get_submodule("patch_embed")
    rows, columns = embedding.grid_size
    height, width = embedding.patch_size
    grids = [(side, rows * columns // side) for side in range(1, rows * columns + 1) if rows * columns % side == 0]
    close = [grid for grid in grids if grid != (rows, columns) and max(grid) <= 8 * min(grid)]
    return tuple((one * height, other * width) for one, other in close)


def taken_for(model: nn.Module, size: Size) -> nn.Module:
    """A copy of a ViT whose position embedding is taken for images of another size with as many patches."""
    result = copy.deepcopy(model)
    embedding: Any = result.get_submodule("patch_embed")
    embedding.set_input_size(img_size=size)
    return result


def size_of_weights(
    reading: Reading, model: nn.Module, name: str, said: Said, wanted: Wanted, path: Path
) -> tuple[Size, str]:
    """The size of the images that weights were made for, and where that is known from.

    Args:
        reading: of a file.
        model: of that architecture.
        name: of the architecture; with a tag it names weights whose size timm knows.
        said: what the file says about itself.
        wanted: a size that is asked for counts where nothing else tells one.
        path: of the file.

    Raises:
        UserError: nothing tells the size, or the position embedding is of no size that is known.
    """
    said_size: Size | None = said.preprocess.get("input_size")
    position, patch = reading.state.get("pos_embed"), reading.state.get("patch_embed.proj.weight")
    if position is None or patch is None or position.ndim != 3:
        return _size_without_position(reading, model, name, said, wanted, path)
    patches, height, width = position.shape[1] - positioned_prefix(model), *patch_size(reading, model)
    guesses = [(said_size, "the checkpoint's arguments"), (wanted.image_size, OPTIONS)]
    for size, source in guesses:
        if size is not None and (size[0] // height) * (size[1] // width) == patches:
            return size, source
    side = math.isqrt(max(patches, 0))
    if side and side * side == patches:
        return (side * height, side * width), SQUARE
    own: Size = tuple(config_of(model)["input_size"][-2:])
    fits_own = (own[0] // height) * (own[1] // width) == patches
    if fits_own or patches <= 0 or not without_position(fitted(reading, model)).exact:
        return own, "timm's configuration"
    raise UserError(
        f"The position embedding of {path} has {patches} patches, which is no square.",
        why="Height and width of the images that it was trained on cannot be told from it.",
        fix=f"Give them: `image_size=(H, W)`, with H / {height} times W / {width} = {patches}.",
    )


def positioned_prefix(model: nn.Module) -> int:
    """How many tokens before the patches have a position of their own."""
    return 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 1))


def without_position(fit: Fit) -> Fit:
    """The fit at any size of the images."""
    shapes = tuple(shape for shape in fit.shapes if not shape.startswith("pos_embed "))
    return replace(fit, shapes=shapes)


def patch_size(reading: Reading, model: nn.Module) -> Size:
    """Height and width of a patch, from the weights where they are a convolution."""
    weight = reading.state["patch_embed.proj.weight"]
    size = tuple(weight.shape[-2:]) if weight.ndim == 4 else model.get_submodule("patch_embed").patch_size
    return int(size[0]), int(size[1])  # type: ignore[index]


def _size_without_position(
    reading: Reading, model: nn.Module, name: str, said: Said, wanted: Wanted, path: Path
) -> tuple[Size, str]:
    said_size: Size | None = said.preprocess.get("input_size")
    if said_size is not None:
        return said_size, "the checkpoint's arguments"
    if wanted.image_size is not None:
        return wanted.image_size, OPTIONS
    if said.has_arguments and said.architecture is not None:
        return _timm_size(said.architecture), f"timm's configuration of {said.architecture}, as its arguments say"
    if not fitted(reading, model).exact:  # what is in the way is said first
        return _timm_size(name), "timm's configuration"
    if "." in name:
        return _timm_size(name), f"timm's configuration of {name}"
    raise UserError(
        f"Which image size was {path} trained at?",
        why="This architecture has no position embedding that would tell, the file says nothing, and at another size "
        "the network is much worse than it is.",
        fix=f"Give `image_size={_timm_size(name)[0]}` if it was trained like timm's own weights, or its real size.",
    )


def _timm_size(name: str) -> Size:
    size: Size = tuple(timm.get_pretrained_cfg(name).input_size[-2:])
    return size


def prepare(model: nn.Module, name: str, said: Said, wanted: Wanted, where: str) -> dict[str, str]:
    """Set how images are prepared; the sources of all entries but the size, by name.

    Args:
        model: gets the entries.
        name: of its architecture, perhaps with a tag.
        said: what its weights say.
        wanted: what the user says.
        where: what the weights' own values are called, such as `the checkpoint's arguments`.

    Raises:
        UserError: a mean or std is for other channels than the network's.
    """
    channels = int(model.get_submodule("patch_embed").get_parameter("proj.weight").shape[1])
    known = timm.get_pretrained_cfg(said.architecture).to_dict() if said.architecture else config_of(model)
    entries = {key: known[key] for key in _FIELDS if known.get(key) is not None}
    sources = dict.fromkeys(_FIELDS, f"timm's configuration of {said.architecture or name}")
    theirs = {key: value for key, value in said.preprocess.items() if key in _FIELDS}
    theirs = {k: v for k, v in theirs.items() if k not in ("mean", "std") or len(v) in (1, channels)}
    chosen = checked_preprocess(wanted.preprocess, channels)
    for values, source in ((theirs, where), (chosen, OPTIONS)):
        entries |= values
        sources |= dict.fromkeys(values, source)
    update_config(model, **fitting_channels({**config_of(model), **entries}, channels))
    return sources


def fitting_channels(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """A configuration whose mean and std have one value per channel: their average where they had three."""
    result = dict(config)
    for name in ("mean", "std"):
        values = result[name]
        if len(values) != channels:
            result[name] = (sum(values) / len(values),) * channels
    result["input_size"] = (channels, *tuple(result["input_size"])[-2:])
    return result
