"""What weights look like that do not fit, which of timm's architectures they fit, and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import timm
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.building import build
from upvits.toolchain.networks.catalogue import Architecture, architectures
from upvits.toolchain.networks.layouts import State
from upvits.toolchain.networks.readings import Fit, Reading, fitted, readings
from upvits.toolchain.networks.settle import positioned_prefix, without_position
from upvits.toolchain.networks.weight_files import Weights, lora, some
from upvits.toolchain.structure.meta import on_meta

_LOOKS = (
    (r"(^|\.)(bbox_head|rpn_head|roi_head|mask_head|rpn|detr|class_embed|bbox_embed)\.", "a detector"),
    (r"(^|\.)(decode_head|auxiliary_head|segmentation_head|mask_embed)\.", "a segmentation network"),
    (r"relative_position_bias_table|layers\.\d+\.blocks\.\d+\.attn\.qkv", "a Swin or BEiT transformer"),
    (r"^(module\.)?conv_proj\.weight|encoder\.layers\.encoder_layer_0\.", "a ViT of torchvision, in its naming"),
    (r"(^|\.)vision_model\.encoder\.layers\.", "a CLIP or SigLIP image tower of transformers"),
    (r"(^|\.)(layer1|layer4)\.\d+\.conv1\.", "a ResNet"),
    (r"stages\.\d+\.blocks\.\d+\.(conv_dw|gamma|pwconv)|downsample_layers\.", "a ConvNeXt"),
    (r"(^|\.)(q_proj|k_proj)\.weight|lm_head|word_embeddings", "a language model, or another naming of attention"),
    (r"(^|\.)(bn\d|features\.\d+)\.", "a convolutional network"),
)
"""What names of tensors tell, the surest first."""


def looks_like(names: Iterable[str]) -> str:
    """What kind of network has tensors of these names; empty where that cannot be told."""
    names = list(names)
    return next((kind for pattern, kind in _LOOKS if any(re.search(pattern, name) for name in names)), "")


def described(state: State) -> str:
    """A network under timm's names in a few words: `a ViT of width 384, depth 12, patch 14`."""
    depths = [
        len({match[1] for name in state if (match := re.match(rf"{start}(\d+)\.", name))})
        for start in (r"blocks\.", *(rf"stages\.{stage}\.blocks\." for stage in range(4)))
    ]
    patch = state.get("patch_embed.proj.weight")
    width = "?" if patch is None else len(patch)
    if depths[0]:
        size = "?" if patch is None or patch.ndim != 4 else patch.shape[-1]
        tokens = ", with registers" if "reg_token" in state else ""
        return f"a ViT of width {width}, depth {depths[0]}, patch {size}{tokens}"
    if not any(depths):
        return f"a patch embedding of width {width}, and no blocks under names that are known"
    return f"a PVTv2 of depths {', '.join(map(str, depths[1:]))} and width {width} in its first stage"


def nearest(reading: Reading, most: int = 3) -> list[tuple[str, Fit]]:
    """timm's architectures that come nearest to the tensors of a reading, and how they fit; the best first."""
    state = reading.state
    alike = [one for one in architectures() if _same_size(one, state)]
    found = []
    for one in alike:
        try:
            with on_meta():
                model = build(one.name, num_classes=reading.num_classes)
        except UserError:
            continue
        fit = fitted(reading, model)
        found.append((one.name, without_position(fit) if _is_square(state, model) else fit))
    found.sort(key=lambda pair: (_faults(pair[1]), not timm.is_model_pretrained(pair[0]), len(pair[0])))
    return found[:most]


def _same_size(one: Architecture, state: State) -> bool:
    patch = state.get("patch_embed.proj.weight")
    if patch is None:
        return False
    if isinstance(one.embed_dim, int):
        blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
        return (one.embed_dim, one.depth) == (len(patch), len(blocks))
    depths = tuple(
        len({match[1] for name in state if (match := re.match(rf"stages\.{stage}\.blocks\.(\d+)\.", name))})
        for stage in range(4)
    )
    return one.depth == depths and one.embed_dim[0] == len(patch)


def _is_square(state: State, model: nn.Module) -> bool:
    """Whether the position embedding, if any, is for a square, with the first tokens of this network."""
    position = state.get("pos_embed")
    patches = 0 if position is None or position.ndim != 3 else position.shape[1] - positioned_prefix(model)
    return patches >= 0 and math.isqrt(patches) ** 2 == patches


def _faults(fit: Fit) -> int:
    return len(fit.missing) + len(fit.unknown) + len(fit.shapes)


def faults(fit: Fit) -> str:
    """What is in the way, in words."""
    parts = (
        f"missing: {some(list(fit.missing))}" if fit.missing else "",
        f"unknown: {some(list(fit.unknown))}" if fit.unknown else "",
        f"mis-shaped: {some(list(fit.shapes))}" if fit.shapes else "",
    )
    return "; ".join(part for part in parts if part)


def of_another_kind(weights: Weights) -> UserError | None:
    """The message for weights that are no classifier's: an adapter, a detector; None for others."""
    names = [name for state in weights.states.values() for name in state]
    if any(re.search(r"lora_[AB]\b|lora_(up|down)", name) for name in names):
        return lora(weights.path)
    kind = looks_like(names)
    if kind in ("a detector", "a segmentation network"):
        return UserError(
            f"{weights.path} looks like {kind}, not a classifier.",
            why="It has necks and heads that a classifier lacks, and is judged by other numbers.",
            fix="`upvits-deploy detect` takes detectors of mmdet on these backbones (see docs/detection.md). To prune "
            "the backbone alone, save its part of the state_dict to a file of its own.",
        )
    return None


def does_not_fit(architecture: str, weights: Weights, tried: Sequence[tuple[Reading, Fit]]) -> UserError:
    """The message for weights of which no reading fits."""
    other = of_another_kind(weights)
    if other is not None:
        return other
    if not tried:
        names = [name for state in weights.states.values() for name in state]
        return _unknown(architecture, weights, looks_like(names), names)
    reading, fit = min(tried, key=lambda pair: _faults(pair[1]))
    near = nearest(reading)
    base = architecture.partition(".")[0]
    exact = [name for name, one in near if one.exact and name != base]
    if exact:
        fix = f'Give `name="{exact[0]}"`' + (f" (or {', '.join(exact[1:])})." if exact[1:] else ".")
    elif near and near[0][0] != base:
        fix = f"The nearest of timm's architectures is {near[0][0]}; there it is {faults(near[0][1])}."
    else:
        fix = _built_with(reading.state)
    return UserError(
        f"{weights.path} does not fit {architecture}: {faults(fit)}.",
        why=f"It holds {described(reading.state)}, and every tensor must agree, or the network would compute something "
        "else.",
        fix=fix,
    )


def _built_with(state: State) -> str:
    """What to do about a network that has no name in timm: its arguments, as far as tensors tell."""
    patch, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if patch is None or hidden is None or patch.ndim != 4 or hidden.ndim != 2 or not hidden.shape[1]:
        return (
            "Give the timm arguments that it was built with as `model_args=`, or save the network with `upvits.save`."
        )
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    arguments = {"embed_dim": len(patch), "depth": depth, "patch_size": patch.shape[-1],
                 "mlp_ratio": round(hidden.shape[0] / hidden.shape[1], 4)}  # fmt: skip
    return (
        f"Give the timm arguments that it was built with: `model_args={arguments}` and its num_heads, which no tensor "
        "tells. Or save the network with `upvits.save` where it was made."
    )


def _unknown(architecture: str, weights: Weights, kind: str, names: list[str]) -> UserError:
    what = f"It looks like {kind}" if kind else "Its names are of no layout that is known here"
    return UserError(
        f"{weights.path} does not fit {architecture}: no tensor is called as a patch embedding of timm, of the "
        "official PVTv2, of OpenCLIP or of transformers.",
        why=f"{what}: {some(names)}.",
        fix="Give weights of a ViT or PVTv2 in one of these namings; `upvits-deploy models` lists what can be pruned.",
    )


def ambiguous(path: Path, fits: Sequence[Reading]) -> UserError:
    """The message for a file of which several readings fit equally well."""
    titles = [reading.title for reading in fits]
    return UserError(
        f"{path} holds several networks that fit equally well: {some(titles)}.",
        why="Which of them is meant cannot be told, and they compute different things.",
        fix="Save the one that you mean to a file of its own, e.g. with safetensors.torch.save_file.",
    )


def doubtful_activation(architecture: str, path: Path) -> UserError:
    """The message for CLIP weights, whose tensors are the same with either activation."""
    return UserError(
        f"Which activation has the network in {path}?",
        why="It is in the naming of OpenCLIP, where networks trained by OpenAI (and a few others) use quick_gelu and "
        "the rest gelu; their tensors have the same names.",
        fix=f'Give `model_args={{"act_layer": "quick_gelu"}}` or `model_args={{"act_layer": "gelu"}}`; '
        f"without either, {architecture} would use gelu.",
    )


def first_reading(weights: Weights) -> Reading | None:
    """A reading of weights without a name of an architecture, by either family; None where no layout is known."""
    for name in ("pvt_v2_b0", "vit_tiny_patch16_224"):
        with on_meta():
            model = build(name)
        for reading in readings(weights.states, model):
            stages = any(part.startswith("stages.") for part in reading.state)
            if stages == (name == "pvt_v2_b0"):
                return reading
    return None
