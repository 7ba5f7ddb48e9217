"""Rotation of the stage streams of a PVTv2 before their widths are cut, in stock form.

What `toolchain.compensation.stream` does to a ViT: every token of a stage's stream x becomes M x = sqrt(k / d) E V^T x,
with all of E V^T [k, d] orthogonal to the ones on both sides. Four things are different.

- A stage's stream starts with a LayerNorm, x = w * Cz / s(z) + b with weights w per channel (C takes out the mean). The
  convolution before it takes the weights in and writes M diag(w) C z; the norm then divides by the size of that instead
  of s(z), and so gives every token a wrong factor: up to a constant, which becomes the norm's weight, it is close to 1.
  This alone is not exact at k = d, so stages that keep their width are not rotated.
- The bias of a stage's closing norm cannot move into the next convolution, which pads with zeros. That norm gives
  x^ + 1 instead of x^: the mean over channels, which x^ has none of, tells tokens from padding, and the convolution
  reads bias and shift through it. This is exact.
- Spatial reduction is a linear map, a LayerNorm and keys and values that read it: a stream of its own in each block,
  with a basis of its own. In linear attention (b2_li) a GELU follows, and channels are chosen there.
- Each stage has its own width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import ImageSet
from upvits.toolchain.compensation.basis import (
    TINY,
    CutBasis,
    StreamMoments,
    best_reads,
    cut_basis,
    kept_energy,
    measure,
    read_through,
)
from upvits.toolchain.compensation.fold import Reading
from upvits.toolchain.families import narrow
from upvits.toolchain.structure.groups import Widths
from upvits.toolchain.structure.layers import adopt_parameters

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class RotatedStages:
    """A PVTv2 whose stage streams were rotated and cut.

    Attributes:
        model: the same timm class at the new stage widths; attention dims and FFN units as before.
        stream_maps: for every stage that was cut (`stages.0`) M [k, d] float64: the new stream is about M x.
        layer_maps: likewise for the outputs of the layers before other norms: embeddings and spatial reductions.
        kept_energy: share of each normalised stream's second moment that its k - 1 directions hold.
    """

    model: nn.Module
    stream_maps: dict[str, Tensor]
    layer_maps: dict[str, Tensor]
    kept_energy: dict[str, float]


def stages_can_rotate(model: nn.Module) -> str | None:
    """Why the stage streams of this network cannot be rotated within its timm class, or None when they can."""
    if not isinstance(model, PyramidVisionTransformerV2):
        return "it is no PVTv2"
    pvt: Any = model
    if not isinstance(pvt.head, nn.Linear):
        return "it has no head that could take the rotation back: its output is the stream itself"
    for index in range(len(pvt.stages)):
        for reading in _readings(pvt, index):
            if not isinstance(pvt.get_submodule(reading.norm), nn.LayerNorm):
                return f"{reading.norm} is no LayerNorm"
            for reader in reading.readers:
                if pvt.get_submodule(reader).bias is None:
                    return f"{reader} has no bias that could take the bias of {reading.norm}"
    return None


def rotate_stages(
    model: nn.Module,
    images: ImageSet,
    keep: Mapping[str, Sequence[int]],
    *,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = True,
) -> RotatedStages:
    """Rotate the streams of PVTv2 stages into the directions that matter and cut them.

    Args:
        model: a timm PVTv2, not changed; `stages_can_rotate` must give None.
        images: calibration images [N, 3, H, W], normalised; labels are not needed.
        keep: stage (`stages.0`) -> kept channels. Only their number matters, but for the GELU of linear attention.
            Stages that are not named, or keep all channels, stay as they are.
        batch_size: images per pass; memory grows with it, and not with the images.
        seed: for the random gradients.
        quiet: no progress bar.

    Raises:
        UserError: the streams of this network cannot be rotated, or a width is out of range.

    Example:
        >>> import timm, torch
        >>> dense = timm.create_model("pvt_v2_b0", num_classes=5).eval()
        >>> rotated = rotate_stages(dense, torch.randn(4, 3, 64, 64), {"stages.0": range(24)})
        >>> rotated.model.feature_info[0]["num_chs"], tuple(rotated.stream_maps["stages.0"].shape)
        (24, (24, 32))
    """
    _require(model, keep)
    return cut_stages(model, measure_stages(model, images, batch_size=batch_size, seed=seed, quiet=quiet), keep)


def _require(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> None:
    reason = stages_can_rotate(model)
    if reason is not None:
        raise UserError(
            f"The stage streams of this {type(model).__name__} cannot be rotated: {reason}.",
            why="A rotation needs layers that take it in and give it back.",
            fix="Choose channels instead; FFN units and head dims are compensated all the same.",
        )
    for stage, channels in keep.items():
        dim: Any = model.get_parameter(f"{stage}.norm.weight").numel()
        if not 2 <= len(channels) <= dim:
            raise UserError(
                f"The stream of {stage} has {dim} channels and cannot be cut to {len(channels)}.",
                fix=f"Give a width from 2 to {dim}.",
            )


def measure_stages(
    model: nn.Module, images: ImageSet, *, batch_size: int = 16, seed: int = 0, quiet: bool = True
) -> dict[str, StreamMoments]:
    """The moments from which the streams are cut to any width; two backward passes per image.

    Args: as for `rotate_stages`.

    Returns:
        Moments of every stage (`stages.0`), and by their norms those of the embeddings and of spatial reduction.

    Raises:
        UserError: the streams of this network cannot be rotated.
    """
    _require(model, {})
    pvt: Any = copy.deepcopy(model).eval()
    streams: dict[str, list[str]] = {}
    for index, stage in enumerate(pvt.stages):
        streams[f"stages.{index}"] = [reading.norm for reading in _readings(pvt, index)]
        norms = [f"{_embedding(index)}.norm"]
        reduced = [i for i, block in enumerate(stage.blocks) if block.attn.sr is not None and block.attn.act is None]
        norms += [f"stages.{index}.blocks.{i}.attn.norm" for i in reduced]
        streams |= {norm: [norm] for norm in norms}
    sizes = {stream: pvt.get_submodule(norms[0]).normalized_shape[0] for stream, norms in streams.items()}
    for norms in streams.values():
        for norm in norms:
            pvt.set_submodule(norm, _SplitNorm(pvt.get_submodule(norm)))
    inner = {stream: [f"{norm}.plain" for norm in norms] for stream, norms in streams.items()}
    return measure(pvt, inner, sizes, images, "Measuring the streams", batch_size=batch_size, seed=seed, quiet=quiet)


class _SplitNorm(nn.LayerNorm):
    """A LayerNorm that normalises in a module of its own, which can be looked at."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.plain(x)
        return normalised * self.weight + self.bias


def _embedding(stage: int) -> str:
    return "patch_embed" if stage == 0 else f"stages.{stage}.downsample"


def _readings(model: nn.Module, stage: int) -> tuple[Reading, ...]:
    """Where the stream of a stage is read; the closing norm is the last."""
    pvt: Any = model
    result = []
    for index, block in enumerate(pvt.stages[stage].blocks):
        name = f"stages.{stage}.blocks.{index}"
        keys = f"{name}.attn.{'kv' if block.attn.sr is None else 'sr'}"
        result.append(Reading(f"{name}.norm1", (f"{name}.attn.q", keys)))
        result.append(Reading(f"{name}.norm2", (f"{name}.mlp.fc1",)))
    after = "head" if stage + 1 == len(pvt.stages) else f"{_embedding(stage + 1)}.proj"
    return (*result, Reading(f"stages.{stage}.norm", (after,)))


def cut_stages(
    model: nn.Module, moments: Mapping[str, StreamMoments], keep: Mapping[str, Sequence[int]]
) -> RotatedStages:
    """Rotate and cut the streams by moments that were measured on the same network.

    Args:
        model: the network that `measure_stages` got.
        moments: its result.
        keep: as for `rotate_stages`.

    Raises:
        UserError: the streams of this network cannot be rotated, or a width is out of range.
    """
    _require(model, keep)
    state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    stream_maps: dict[str, Tensor] = {}
    layer_maps: dict[str, Tensor] = {}
    energy: dict[str, float] = {}
    for stage, channels in keep.items():
        if len(channels) < len(state[f"{stage}.norm.weight"]):
            basis = cut_basis(moments[stage], len(channels))
            index = int(stage.rpartition(".")[2])
            stream_maps[stage] = basis.writes
            energy[stage] = kept_energy(moments[stage], basis.directions)
            layer_maps |= _cut_stage(model, state, moments, index, basis, channels)
    shrunk = narrow(model, Widths(channels={stage: len(channels) for stage, channels in keep.items()}))
    dtype = next(model.parameters()).dtype
    result = adopt_parameters(shrunk, {name: tensor.to(dtype) for name, tensor in state.items()})
    return RotatedStages(result, stream_maps, layer_maps, energy)


def _cut_stage(
    model: nn.Module,
    state: State,
    moments: Mapping[str, StreamMoments],
    stage: int,
    basis: CutBasis,
    channels: Sequence[int],
) -> dict[str, Tensor]:
    """Change the parameters of one stage in `state`; maps of the layers before its embedding and reduction norms."""
    pvt: Any = model
    embedding = _embedding(stage)
    maps = {f"{embedding}.proj": _write_embedding(state, embedding, basis.writes, moments[f"{embedding}.norm"])}
    for place, reading in enumerate(_readings(model, stage)):
        reads, shift = best_reads(moments[f"stages.{stage}"], basis.directions, place)
        _read_norm(state, reading, reads @ basis.reads, shift, padded=reading.readers[0].endswith("downsample.proj"))
    for index, block in enumerate(pvt.stages[stage].blocks):
        name = f"stages.{stage}.blocks.{index}"
        for writer in (f"{name}.attn.proj", f"{name}.mlp.fc2"):
            _write(state, writer, basis.writes)
        if block.attn.act is not None:
            maps[f"{name}.attn.sr"] = _choose_reduced(state, f"{name}.attn", channels)
        elif block.attn.sr is not None:
            maps[f"{name}.attn.sr"] = _turn_reduced(state, f"{name}.attn", moments[f"{name}.attn.norm"], len(channels))
    return maps


def _write(state: State, writer: str, turn: Tensor) -> None:
    """Let a layer write turn @ y [k] where it wrote y [d]."""
    state[f"{writer}.weight"] = torch.einsum("kd,d...->k...", turn, state[f"{writer}.weight"])
    state[f"{writer}.bias"] = turn @ state[f"{writer}.bias"]


def _write_embedding(state: State, embedding: str, writes: Tensor, moments: StreamMoments) -> Tensor:
    """Turn what leaves an embedding; the map of what its convolution writes.

    The convolution writes what has the variance of z on average, so that eps means the same.
    """
    weight, bias = f"{embedding}.norm.weight", f"{embedding}.norm.bias"
    projection = writes * state[weight]
    projection = projection - projection.mean(dim=1, keepdim=True)
    second = moments.weighted_second[0]
    energy = (projection * (projection @ second)).sum() / len(projection)
    size = (energy / second.diagonal().mean().clamp_min(TINY)).clamp_min(TINY).sqrt()
    _write(state, f"{embedding}.proj", projection / size)
    state[weight] = size.expand(len(writes))
    state[bias] = writes @ state[bias]
    return projection / size


def _read_norm(state: State, reading: Reading, reads: Tensor, shift: Tensor, *, padded: bool) -> None:
    """Let the readers of a norm take x^ from the new one as reads [d, k] @ y + shift; the new norm has weight 1.

    Args:
        padded: the reader is a convolution that pads with zeros, which count as tokens without bias and shift.
    """
    width = reads.shape[1]
    weight, bias = state[f"{reading.norm}.weight"], state[f"{reading.norm}.bias"]
    reads, shift = weight.unsqueeze(1) * reads, weight * shift + bias
    if padded:
        reads, shift = reads + shift.unsqueeze(1) / width, torch.zeros_like(shift)
    for reader in reading.readers:
        read_through(state, reader, reads, shift)
    state[f"{reading.norm}.weight"] = weight.new_ones(width)
    state[f"{reading.norm}.bias"] = weight.new_full((width,), float(padded))


def _turn_reduced(state: State, attention: str, moments: StreamMoments, width: int) -> Tensor:
    """Rotate and cut what keys and values read after spatial reduction; the map of what the reduction writes."""
    basis = cut_basis(moments, width)
    reads, shift = best_reads(moments, basis.directions, 0)
    _write(state, f"{attention}.sr", basis.writes)
    _read_norm(state, Reading(f"{attention}.norm", (f"{attention}.kv",)), reads @ basis.reads, shift, padded=False)
    return basis.writes


def _choose_reduced(state: State, attention: str, channels: Sequence[int]) -> Tensor:
    """Choose channels of what linear attention reduces to; the map of what the reduction writes."""
    kept = list(channels)
    for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias"):
        state[f"{attention}.{name}"] = state[f"{attention}.{name}"][kept]
    weight = state[f"{attention}.kv.weight"]
    dim = weight.shape[1]
    state[f"{attention}.kv.weight"] = weight[:, kept]
    return torch.eye(dim, dtype=weight.dtype, device=weight.device)[kept]
