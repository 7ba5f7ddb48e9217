"""Reading weights that somebody else saved: safetensors or torch files, never code."""

from __future__ import annotations

import hashlib
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upvits.calib_data.errors import UserError

_UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, in fp32; EMA weights are preferred where a training script kept both.

    Raises:
        UserError: the file is missing or unreadable, is a pickle with code in it, or holds no tensors or NaN.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint file {path}.", fix="Give a .safetensors, .pth or .pt file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns of unusual pickles; what matters here is whether it reads them
            state = load_state_dict(str(path), weights_only=True)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)} if _is_mapping(state) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors.", fix="Expected is a state dict in safetensors or torch format.")
    return as_fp32(tensors, str(path))


def _unreadable(path: Path, error: Exception) -> UserError:
    # torch raises UnpicklingError for a pickle with code in it; newer timm turns that into a RuntimeError
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return UserError(
            f"{path} holds more than tensors, and is not loaded.",
            why="Such a pickle can run code on your machine when it is opened.",
            fix="In the environment that made it, save `model.state_dict()` with safetensors.torch.save_file.",
        )
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return UserError(
        f"{path} cannot be read as a checkpoint ({reason}).",
        fix="Is the file complete? Expected is a state dict in safetensors or torch format.",
    )


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def as_fp32(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Floating-point tensors as fp32; NaN and infinity are refused.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    result = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    broken = [name for name, value in result.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{source} holds NaN or infinite values in {_some(broken)}.",
            why="Nothing that is computed from them would mean anything.",
            fix="Use an earlier checkpoint of that training.",
        )
    return result


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names, types, shapes and values of a network's tensors; tells whose scores or plan it is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def num_classes_in(state: Mapping[str, Tensor]) -> int:
    """Rows of the classifier in a state dict in timm naming; 0 when there is none."""
    head = state.get("head.weight")
    return int(head.shape[0]) if head is not None and head.ndim == 2 else 0


def image_size_in(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Side in pixels that a square position embedding was made for; None for models without one."""
    if not isinstance(model, VisionTransformer) or "pos_embed" not in state:
        return None
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    shape = state["pos_embed"].shape
    patches = shape[1] - prefix if len(shape) == 3 else 0
    # what cannot be a square of patches is left to the comparison of shapes
    return math.isqrt(patches) * cast(int, model.patch_embed.patch_size[0]) if patches > 0 else None


def resample_position_embedding(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict with its position embedding at the image size of `model` (bicubic, as timm does)."""
    if not isinstance(model, VisionTransformer) or "pos_embed" not in state or model.pos_embed is None:
        return state
    shape, target = state["pos_embed"].shape, model.pos_embed.shape
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = shape[1] - prefix if len(shape) == 3 else 0
    if shape == target or shape[-1:] != target[-1:] or patches <= 0 or math.isqrt(patches) ** 2 != patches:
        return state  # what is no square of patches is left to the comparison of shapes
    resampled = resample_abs_pos_embed(
        state["pos_embed"], new_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix
    )
    return {**state, "pos_embed": resampled}


def check_state(state: Mapping[str, Tensor], model: nn.Module, source: str, architecture: str) -> None:
    """Compare names and shapes with the model's.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; names the first few of each.
    """
    shapes_needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in shapes_needed if name not in state]
    extra = [name for name in state if name not in shapes_needed]
    shapes = [
        f"{name} is {tuple(state[name].shape)} instead of {shape}"
        for name, shape in shapes_needed.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    faults = [
        f"missing: {_some(missing)}" if missing else "",
        f"unknown: {_some(extra)}" if extra else "",
        f"mis-shaped: {_some(shapes)}" if shapes else "",
    ]
    if any(faults):
        raise UserError(
            f"{source} does not fit {architecture}: {'; '.join(fault for fault in faults if fault)}.",
            why="Every tensor must agree, or the network would compute something else.",
            fix="Check `name=`: the checkpoint must hold exactly that timm architecture, in timm's naming.",
        )


def _some(items: list[str], count: int = 4) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
