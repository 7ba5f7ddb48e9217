"""In which basis a stream is cut, and how its readers then see it.

Which directions stay: not those with the most energy, but those that the output needs. The loss of reading x^ + e
instead of the normalised x^ is 1/2 E[(e . g)^2] with the gradients g of the Fisher information
(`toolchain.scores.fisher`), so with G = E[g g^T] and S = E[x^ x^^T] over tokens and depths the best directions span the
first eigenvectors of G^1/2 S G^1/2, seen through G^1/2. Every reader then gets the linear map from the kept directions
that is best on its own tokens, weighted by how much the output depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upvits.calib_data.prepared import ImageSet
from upvits.toolchain.compensation.gradients import most_at_once, output_gradients, parts_of
from upvits.toolchain.compensation.statistics import add_gram
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.backward import frozen
from upvits.toolchain.scores.divergence import device_of
from upvits.toolchain.scores.room import with_room

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


def measure(
    model: nn.Module,
    streams: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    images: ImageSet,
    title: str,
    *,
    batch_size: int,
    seed: int,
    quiet: bool,
) -> dict[str, StreamMoments]:
    """Moments of several streams; two backward passes per image.

    Args:
        model: in eval mode.
        streams: for every stream the norms that it is read through, which have no weight and bias of their own.
        sizes: channels of every stream.
        images: calibration images [N, 3, H, W], normalised.
        title: of the progress bar.
        batch_size: images per pass.
        seed: for the random gradients.
        quiet: no progress bar.
    """
    names = [name for norms in streams.values() for name in norms]
    places = {name: (stream, place) for stream, norms in streams.items() for place, name in enumerate(norms)}
    network = frozen(model)

    def sums_of(size: int) -> dict[str, _Sums]:
        sums = {stream: _Sums(len(norms), sizes[stream], device_of(model)) for stream, norms in streams.items()}
        for part, signs in parts_of(network, images, batch_size, size, title, seed=seed, quiet=quiet):
            for found in output_gradients(network, names, part, signs):
                for name, seen in found.items():
                    stream, place = places[name]
                    sums[stream].add(place, *seen)
        return sums

    sums = with_room(sums_of, most_at_once(model, images, batch_size))
    for one in sums.values():
        shared().sum(one.second, one.weighted, one.weighted_sum, one.weight, one.importance, one.tokens)
    return {stream: stream_sums.moments(len(images)) for stream, stream_sums in sums.items()}


class _Sums:
    """Running sums over tokens."""

    def __init__(self, places: int, dim: int, device: torch.device) -> None:
        self.second = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.weighted = torch.zeros(places, dim, dim, dtype=torch.float64, device=device)
        self.weighted_sum = torch.zeros(places, dim, dtype=torch.float64, device=device)
        self.weight = torch.zeros(places, dtype=torch.float64, device=device)
        self.importance = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, place: int, normalised: Tensor, gradients: Tensor) -> None:
        # products of one part in fp32: their rounding is far below RIDGE; sums in float64
        tokens, slopes = normalised.flatten(0, -2), gradients.flatten(1, -2)  # [T, d], [draws, T, d]
        weight = slopes.double().square().sum(dim=(0, 2))
        size = weight.mean().clamp_min(TINY)  # squared gradients may be too small for fp32
        weighted = tokens * (weight / size).sqrt().to(tokens.dtype).unsqueeze(1)
        add_gram(self.second, tokens)
        add_gram(self.weighted[place], weighted, float(size))
        self.weighted_sum[place] += weight @ tokens.double()
        self.weight[place] += weight.sum()
        add_gram(self.importance, (slopes.flatten(0, 1) / size.sqrt()).to(tokens.dtype), float(size))
        self.tokens += len(tokens)

    def moments(self, images: int) -> StreamMoments:
        weight = self.weight.clamp_min(TINY)
        return StreamMoments(
            second=self.second * (len(weight) / self.tokens),
            importance=self.importance / images,
            weighted_second=self.weighted / weight.view(-1, 1, 1),
            weighted_mean=self.weighted_sum / weight.view(-1, 1),
        )


def best_directions(moments: StreamMoments, count: int) -> Tensor:
    """[d, count], orthonormal and orthogonal to the ones: the span that keeps most of what the output depends on."""
    basis = zero_mean_basis(len(moments.second), moments.second.device)
    importance = basis.T @ moments.importance @ basis
    importance = importance / importance.diagonal().mean().clamp_min(TINY)
    importance.diagonal().add_(EVENNESS)
    values, vectors = torch.linalg.eigh(importance)
    root = (vectors * values.sqrt()) @ vectors.T
    seen = root @ basis.T @ moments.second @ basis @ root
    best = torch.linalg.eigh(seen).eigenvectors.flip(1)[:, :count]
    directions: Tensor = basis @ torch.linalg.qr(root @ best).Q
    return directions


@dataclass(frozen=True, slots=True)
class CutBasis:
    """How a stream of d channels lies in k.

    Attributes:
        directions: V [d, k - 1], what is kept.
        writes: M = sqrt(k / d) E V^T [k, d]: the new stream is M x.
        reads: [k - 1, k], gives V^T x back.
    """

    directions: Tensor
    writes: Tensor
    reads: Tensor


def cut_basis(moments: StreamMoments, width: int) -> CutBasis:
    """The basis in which a stream with these moments is cut to `width` channels."""
    directions = best_directions(moments, width - 1)
    embedding = zero_mean_basis(width, directions.device)
    scale = math.sqrt(width / len(directions))
    return CutBasis(directions, scale * embedding @ directions.T, embedding.T / scale)


def kept_energy(moments: StreamMoments, directions: Tensor) -> float:
    """Share of the normalised stream's second moment that the directions [d, n] hold."""
    return float((directions * (moments.second @ directions)).sum() / moments.second.trace())


def best_reads(moments: StreamMoments, directions: Tensor, place: int) -> tuple[Tensor, Tensor]:
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


def read_through(state: dict[str, Tensor], reader: str, turn: Tensor, shift: Tensor) -> None:
    """Let a Linear or an unpadded Conv2d (by name) in `state` read y [k] where it read turn @ y + shift [d]."""
    weight = state[f"{reader}.weight"]
    if f"{reader}.bias" in state:
        taps = weight.reshape(*weight.shape[:2], -1).sum(dim=2)
        state[f"{reader}.bias"] = state[f"{reader}.bias"] + taps @ shift
    state[f"{reader}.weight"] = (weight.movedim(1, -1) @ turn).movedim(-1, 1)


def zero_mean_basis(size: int, device: torch.device) -> Tensor:
    """[size, size - 1]: orthonormal columns, orthogonal to the vector of ones: the cosines of a DCT.

    They spread every direction over all channels, so that no channel stands out, which quantisation would suffer from.
    """
    rows = torch.arange(size, dtype=torch.float64, device=device).unsqueeze(1) + 0.5
    columns = torch.arange(1, size, dtype=torch.float64, device=device)
    basis: Tensor = (rows * columns * (math.pi / size)).cos() * math.sqrt(2 / size)
    return basis
