"""Rotation of a ViT's residual stream before its width is cut (SliceGPT, arXiv 2401.15024), in stock LayerNorm form.

SliceGPT turns LayerNorm into RMSNorm and keeps the first principal directions of the stream. Here the network stays a
timm network: k - 1 directions V [d, k - 1] are kept, orthogonal to the ones (where the stream of a folded network has
nothing), and are embedded in R^k by a matrix E [k, k - 1] of orthonormal columns, orthogonal to the ones of R^k.
Every token of the new stream sqrt(k / d) E V^T x then has mean zero, and its variance over the k channels is that of x
over the d (as far as V holds x), so LayerNorm does with it what it did before, with the same eps; the readers take the
scale back. With k = d nothing is lost.

Which directions, and what the readers make of them: `toolchain.compensation.basis`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import ImageSet
from upvits.toolchain.compensation.basis import (
    StreamMoments,
    best_reads,
    cut_basis,
    kept_energy,
    measure,
    read_through,
)
from upvits.toolchain.compensation.fold import fold, readings, require_rotatable, stream_axes, stream_can_rotate
from upvits.toolchain.families import narrow
from upvits.toolchain.structure.groups import Widths
from upvits.toolchain.structure.layers import adopt_parameters

__all__ = ["Rotated", "StreamMoments", "cut_stream", "measure_stream", "rotate_stream", "stream_can_rotate"]


@dataclass(frozen=True, slots=True)
class Rotated:
    """A network whose residual stream was rotated and cut.

    Attributes:
        model: the same timm class at embedding width k; every other width as before.
        stream_map: M [k, d] float64: the new stream of a token is M times the dense one's.
        kept_energy: share of the normalised stream's second moment that the k - 1 directions hold.
    """

    model: nn.Module
    stream_map: Tensor
    kept_energy: float


def rotate_stream(
    model: nn.Module, images: ImageSet, width: int, *, batch_size: int = 16, seed: int = 0, quiet: bool = True
) -> Rotated:
    """Rotate the stream of a ViT into the directions that matter and keep `width` channels.

    Args:
        model: a timm ViT, not changed; `stream_can_rotate` must give None.
        images: calibration images [N, 3, H, W], normalised; labels are not needed.
        width: channels of the new stream, 2 <= width <= d; at d the function stays the same.
        batch_size: images per pass; memory grows with it, and not with the images.
        seed: for the random gradients.
        quiet: no progress bar.

    Raises:
        UserError: the stream of this network cannot be rotated, or the width is out of range.

    Example:
        >>> import timm, torch
        >>> dense = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        >>> rotated = rotate_stream(dense, torch.randn(4, 3, 32, 32), 96)
        >>> rotated.model.embed_dim, rotated.model.blocks[0].attn.head_dim, tuple(rotated.stream_map.shape)
        (96, 64, (96, 192))
    """
    _check_width(model, width)
    return cut_stream(model, measure_stream(model, images, batch_size=batch_size, seed=seed, quiet=quiet), width)


def _check_width(model: nn.Module, width: int) -> None:
    require_rotatable(model)
    dim: Any = model.embed_dim
    if not 2 <= width <= dim:
        raise UserError(f"A stream of {dim} channels cannot be cut to {width}.", fix=f"Give a width from 2 to {dim}.")


def measure_stream(
    model: nn.Module, images: ImageSet, *, batch_size: int = 16, seed: int = 0, quiet: bool = True
) -> StreamMoments:
    """The moments from which the stream of a network is cut to any width; two backward passes per image.

    Args: as for `rotate_stream`.

    Raises:
        UserError: the stream of this network cannot be rotated.
    """
    folded = fold(model).to(next(model.parameters()).dtype).eval()
    streams = {"embed": [reading.norm for reading in readings(folded)]}
    dim: Any = model.embed_dim
    moments = measure(
        folded, streams, {"embed": dim}, images, "Measuring the stream", batch_size=batch_size, seed=seed, quiet=quiet
    )
    return moments["embed"]


def cut_stream(model: nn.Module, moments: StreamMoments, width: int) -> Rotated:
    """Rotate and cut the stream by moments that were measured on the same network.

    Args:
        model: the network that `measure_stream` got.
        moments: its result.
        width: channels of the new stream, 2 <= width <= d.

    Raises:
        UserError: the stream of this network cannot be rotated, or the width is out of range.
    """
    _check_width(model, width)
    folded = fold(model)
    basis = cut_basis(moments, width)
    state = folded.state_dict()
    names = {id(parameter): name for name, parameter in folded.named_parameters()}
    with torch.no_grad():
        for parameter, axis in stream_axes(folded):
            state[names[id(parameter)]] = (parameter.movedim(axis, -1) @ basis.writes.T).movedim(-1, axis)
        for place, reading in enumerate(readings(folded)):
            reads, shift = best_reads(moments, basis.directions, place)
            for reader in reading.readers:
                read_through(state, reader, reads @ basis.reads, shift)
    shrunk = narrow(model, Widths(channels={"embed": width}))
    for name, parameter in shrunk.named_parameters():
        if parameter.shape != state[name].shape:  # norms and LayerScale, which are 1 and 0 by now
            state[name] = state[name][:width]
    dtype = next(model.parameters()).dtype
    result = adopt_parameters(shrunk, {name: tensor.to(dtype) for name, tensor in state.items()})
    return Rotated(result, basis.writes, kept_energy(moments, basis.directions))
