"""Rotation of a ViT's residual stream before its width is cut (SliceGPT, arXiv 2401.15024), in stock LayerNorm form.

SliceGPT turns LayerNorm into RMSNorm and keeps the first principal directions of the stream. Here the network stays a
timm network: k - 1 directions V [d, k - 1] are kept, orthogonal to the ones (where the stream of a folded network has
nothing), and are embedded in R^k by a matrix E [k, k - 1] of orthonormal columns, orthogonal to the ones of R^k.
Every token of the new stream sqrt(k / d) E V^T x then has mean zero, and its variance over the k channels is that of x
over the d (as far as V holds x), so LayerNorm does with it what it did before, with the same eps; the readers take the
scale back. With k = d nothing is lost.

Which directions: not those with the most energy, but those that the output needs. The loss of reading x^ + e instead
of the normalised x^ is 1/2 E[(e . g)^2] with the gradients g of the Fisher information (`toolchain.scores.fisher`), so
with G = E[g g^T] and S = E[x^ x^^T] over tokens and depths the best directions span the first eigenvectors of
G^1/2 S G^1/2, seen through G^1/2. Every reader then gets the linear map from the kept directions that is best on its
own tokens, weighted by how much the output depends on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.errors import UserError
from toolchain.compensation.fold import Reading, fold, readings, require_rotatable, stream_axes, stream_can_rotate
from toolchain.compensation.gradients import output_gradients
from toolchain.families import narrow
from toolchain.groups import Widths
from toolchain.layers import adopt_parameters
from toolchain.scores.divergence import device_of

__all__ = ["Rotated", "StreamMoments", "cut_stream", "measure_stream", "rotate_stream", "stream_can_rotate"]

EVENNESS = 1.0
"""Added to the importance of every direction, relative to the mean one: LayerNorm's variance needs all the energy."""

TINY = 1e-30
"""Where the output depends on nothing, everything counts alike."""

RIDGE = 1e-1
"""Of the readers' regression, relative to the mean diagonal."""


@dataclass(frozen=True, slots=True)
class StreamMoments:
    """What the normalised stream of a network is like, and what its output depends on; float64, on the model's device.

    Attributes:
        second: [d, d], E[x^ x^^T] over the tokens of a depth, summed over the depths where the stream is read.
        importance: [d, d], E[g g^T] summed over tokens and depths, per image.
        weighted_second: [depths, d, d], E[x^ x^^T] of each depth, tokens weighted by |g|^2.
        weighted_mean: [depths, d], E[x^] likewise.
    """

    second: Tensor
    importance: Tensor
    weighted_second: Tensor
    weighted_mean: Tensor


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
    model: nn.Module, images: Tensor, width: int, *, batch_size: int = 16, seed: int = 0, quiet: bool = True
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
    model: nn.Module, images: Tensor, *, batch_size: int = 16, seed: int = 0, quiet: bool = True
) -> StreamMoments:
    """The moments from which the stream of a network is cut to any width; two backward passes per image.

    Args: as for `rotate_stream`.

    Raises:
        UserError: the stream of this network cannot be rotated.
    """
    folded = fold(model).to(next(model.parameters()).dtype).eval()
    norms = [reading.norm for reading in readings(folded)]
    channels: Any = folded.embed_dim
    sums = _Sums(len(norms), channels, device_of(model))
    batches = torch.split(images, batch_size)
    for batch in output_gradients(folded, norms, batches, "Measuring the stream", seed=seed, quiet=quiet):
        for place, (normalised, gradients) in enumerate(batch):
            sums.add(place, normalised, gradients)
    return sums.moments(len(images))


class _Sums:
    """Running sums over tokens."""

    def __init__(self, places: int, dim: int, device: torch.device) -> None:
        self.second = torch.zeros(places, dim, dim, dtype=torch.float64, device=device)
        self.weighted = torch.zeros_like(self.second)
        self.weighted_sum = torch.zeros(places, dim, dtype=torch.float64, device=device)
        self.weight = torch.zeros(places, dtype=torch.float64, device=device)
        self.importance = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.tokens = [0] * places

    def add(self, place: int, normalised: Tensor, gradients: Tensor) -> None:
        tokens = normalised.flatten(0, -2).double()
        slopes = gradients.flatten(1, -2).double()  # [draws, T, d]
        weight = slopes.square().sum(dim=(0, 2))
        weighted = tokens * weight.unsqueeze(1)
        self.second[place] += tokens.T @ tokens
        self.weighted[place] += weighted.T @ tokens
        self.weighted_sum[place] += weighted.sum(dim=0)
        self.weight[place] += weight.sum()
        self.importance += torch.einsum("kti,ktj->ij", slopes, slopes)
        self.tokens[place] += len(tokens)

    def moments(self, images: int) -> StreamMoments:
        tokens = torch.tensor(self.tokens, dtype=torch.float64, device=self.second.device)
        weight = self.weight.clamp_min(TINY)
        return StreamMoments(
            second=(self.second / tokens.view(-1, 1, 1)).sum(dim=0),
            importance=self.importance / images,
            weighted_second=self.weighted / weight.view(-1, 1, 1),
            weighted_mean=self.weighted_sum / weight.view(-1, 1),
        )


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
    directions = _directions(moments, width - 1)
    embedding = _zero_mean_basis(width, directions.device)
    scale = math.sqrt(width / len(directions))
    stream_map = scale * embedding @ directions.T
    state = folded.state_dict()
    names = {id(parameter): name for name, parameter in folded.named_parameters()}
    with torch.no_grad():
        for parameter, axis in stream_axes(folded):
            state[names[id(parameter)]] = (parameter.movedim(axis, -1) @ stream_map.T).movedim(-1, axis)
        for place, reading in enumerate(readings(folded)):
            reads, shift = _reads(moments, directions, place)
            _turn_readers(state, reading, reads @ embedding.T / scale, shift)
    shrunk = narrow(model, Widths(channels={"embed": width}))
    for name, parameter in shrunk.named_parameters():
        if parameter.shape != state[name].shape:  # norms and LayerScale, which are 1 and 0 by now
            state[name] = state[name][:width]
    dtype = next(model.parameters()).dtype
    result = adopt_parameters(shrunk, {name: tensor.to(dtype) for name, tensor in state.items()})
    energy = (directions * (moments.second @ directions)).sum() / moments.second.trace()
    return Rotated(result, stream_map, float(energy))


def _turn_readers(state: dict[str, Tensor], reading: Reading, reads: Tensor, shift: Tensor) -> None:
    for name in reading.readers:
        weight = state[f"{name}.weight"]
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = state[f"{name}.bias"] + weight @ shift
        state[f"{name}.weight"] = weight @ reads


def _directions(moments: StreamMoments, count: int) -> Tensor:
    """[d, count], orthonormal and orthogonal to the ones: the span that keeps most of what the output depends on."""
    basis = _zero_mean_basis(len(moments.second), moments.second.device)
    importance = basis.T @ moments.importance @ basis
    importance = importance / importance.diagonal().mean().clamp_min(TINY)
    importance.diagonal().add_(EVENNESS)
    values, vectors = torch.linalg.eigh(importance)
    root = (vectors * values.sqrt()) @ vectors.T
    seen = root @ basis.T @ moments.second @ basis @ root
    best = torch.linalg.eigh(seen).eigenvectors.flip(1)[:, :count]
    directions: Tensor = basis @ torch.linalg.qr(root @ best).Q
    return directions


def _reads(moments: StreamMoments, directions: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Affine map (A [d, k - 1], a [d]) from what V^T x^ becomes in the new network to x^, on the tokens of one depth.

    Ridge regression of what V does not hold on what it holds; the ridge pulls towards A = V. The new LayerNorm sees the
    energy of V^T x^ only and so divides by too little, which A takes back. At k = d all is held, and A = V.
    """
    second, mean = moments.weighted_second[place], moments.weighted_mean[place]
    energy = (directions * (second @ directions)).sum()
    held_share = torch.where(energy > 0, energy / second.trace(), 1.0)
    covariance = second - torch.outer(mean, mean)
    across = covariance @ directions
    held = directions.T @ across
    held.diagonal().add_(RIDGE * held.diagonal().mean().clamp_min(TINY))
    lost = across - directions @ (directions.T @ across)
    reads = directions + torch.linalg.solve(held, lost.T).T
    return reads * held_share.sqrt(), mean - reads @ (directions.T @ mean)


def _zero_mean_basis(size: int, device: torch.device) -> Tensor:
    """[size, size - 1]: orthonormal columns, orthogonal to the vector of ones: the cosines of a DCT.

    They spread every direction over all channels, so that no channel stands out, which quantisation would suffer from.
    """
    rows = torch.arange(size, dtype=torch.float64, device=device).unsqueeze(1) + 0.5
    columns = torch.arange(1, size, dtype=torch.float64, device=device)
    basis: Tensor = (rows * columns * (math.pi / size)).cos() * math.sqrt(2 / size)
    return basis
