"""Scores of all units at once, from gradients of their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from upvits.calib_data.loading import stream
from upvits.calib_data.prepared import ImageSet, in_batches, tensor_of
from upvits.calib_data.progress import watched
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.backward import Signs, frozen, gradients_by_segment, signs_of
from upvits.toolchain.scores.divergence import device_of, half_sums
from upvits.toolchain.scores.masks import masked
from upvits.toolchain.scores.room import images_at_once, with_room
from upvits.toolchain.structure.groups import ChannelGroup

EXACT_CLASSES = 16
"""Up to this many classes the expectation over labels is exact; beyond it, it is sampled."""


DRAWS = 8
"""Random probes per image for the label expectation with many classes."""


def fisher(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: ImageSet,
    scale: float | None,
    *,
    batch_size: int,
    seed: int,
    quiet: bool,
) -> dict[str, Tensor]:
    """1/2 (probe . d output / d mask)^2 per unit, summed in float64 over images with even and with odd position.

    Returns:
        Group name -> float64 [2, size].
    """

    def totals_of(size: int) -> dict[str, Tensor]:
        totals = {group.name: torch.zeros(2, group.size, dtype=torch.float64) for group in groups}
        for position, scores in fisher_per_image(model, groups, images, scale, batch_size, size, seed, quiet):
            for name, values in scores.items():
                totals[name] += half_sums(values, position).cpu()
        return totals

    totals = with_room(totals_of, images_at_once(model, tensor_of(images[:1]).to(device_of(model)), batch_size))
    shared().sum(*totals.values())
    return totals


def fisher_per_image(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: ImageSet,
    scale: float | None,
    batch_size: int,
    size: int,
    seed: int,
    quiet: bool,
    most: int | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The same image by image: for some images at a time of this process, the first one's position, and group name ->
    float64 [B, size].

    Args:
        model, groups, images, scale, seed, quiet: see `score`.
        batch_size: images that a process takes in turn.
        size: images at once.
        most: so many directions at most where the expectation would be exact: time goes with them.
    """
    network = frozen(model)
    batches = shared().mine(in_batches(images, batch_size))
    for number, batch in watched(batches, "Scoring units (fisher)", quiet=quiet):
        for start in range(0, len(batch), size):
            part, first = batch[start : start + size], number * batch_size + start
            signs = signs_of(seed, range(first, first + len(part)))
            yield first, _mask_fisher(network, groups, part, lambda out: probes_of(out.cpu(), scale, signs, most))  # noqa: B023


def _mask_fisher(
    network: nn.Module, groups: Sequence[ChannelGroup], images: Tensor, probes: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """1/2 (probe . d output / d mask)^2 summed over the probes: group name -> float64 [B, size]."""
    device = device_of(network)
    with torch.inference_mode(False):
        masks = {g.name: torch.ones(len(images), g.size, device=device, requires_grad=True) for g in groups}
    slopes: dict[str, Tensor] = {}
    with masked(network, groups, masks):
        for found in gradients_by_segment(network, images, probes, masks):
            for name, gradient in found.items():
                slopes[name] = slopes[name] + gradient if name in slopes else gradient
    return {name: slopes[name].double().square().sum(dim=0) / 2 for name in masks}


def mask_fisher(
    network: nn.Module,
    sizes: Mapping[str, int],
    masked_by: Callable[[Mapping[str, Tensor]], AbstractContextManager[None]],
    batches: Sequence[tuple[int, Tensor]],
    probes_of_outputs: Callable[[Tensor, int], Iterable[Tensor]],
    quiet: bool,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """1/2 (probe . d output / d mask)^2 of every unit, summed over the probes; by batch: number, name -> [B, size].

    Args:
        network: whose output [B, C] counts.
        sizes: units by name of their group.
        masked_by: makes the network run with masks [B, size] by name.
        batches: images, with a number for each batch.
        probes_of_outputs: directions [B, C] for outputs [B, C] of the batch with a number, on the CPU.
        quiet: no progress bar.
    """
    # detached weights: nothing is kept for weight gradients, which halves time and memory
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    device = device_of(network)
    for number, batch in watched(batches, "Scoring units (fisher)", quiet=quiet, total=len(batches)):
        masks = {name: torch.ones(len(batch), size, device=device, requires_grad=True) for name, size in sizes.items()}
        with torch.enable_grad(), masked_by(masks):
            outputs = functional_call(network, weights, batch.to(device)).float()
        scores = {
            name: torch.zeros_like(mask, dtype=torch.float64, requires_grad=False) for name, mask in masks.items()
        }
        for probe in probes_of_outputs(outputs.detach().cpu(), number):
            along = (probe.to(device) * outputs).sum()
            gradients = torch.autograd.grad(along, list(masks.values()), retain_graph=True)
            for name, gradient in zip(masks, gradients, strict=True):
                scores[name] += gradient.double().square() / 2
        del outputs, along  # and what they were computed from
        yield number, scores


def drawn_from(seed: int, number: int) -> torch.Generator:
    """Random numbers of one batch: they are the same, whichever process has the batch."""
    return torch.Generator().manual_seed(stream(seed, number))


def probes_of(outputs: Tensor, scale: float | None, signs: Signs, most: int | None = None) -> Tensor:
    """Directions g [K, B, C] with sum_k g_k g_k^T = the Fisher matrix of the output (exactly, or in expectation).

    For a softmax that matrix is diag(p) - p p^T. Exactly: one direction sqrt(p_y) (e_y - p) per class y. With many
    classes: diag(sqrt p) e - p (sqrt p . e) with random signs e, which uses all classes in every draw and so varies
    less than drawing one label. With `most` and few classes: the strongest eigenvectors of the matrix only.
    """
    size = outputs.shape[1]
    if scale is not None:
        drawn: Tensor = signs(DRAWS, size) / (scale * DRAWS**0.5)
        return drawn
    p = outputs.double().softmax(dim=1)
    root = p.sqrt()
    if size <= EXACT_CLASSES and most is not None and most < size:
        strength, directions = torch.linalg.eigh(torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))
        probes = (directions * strength.clamp_min(0).sqrt().unsqueeze(1))[..., -most:].permute(2, 0, 1)
    elif size <= EXACT_CLASSES:
        probes = root.T.unsqueeze(2) * (torch.eye(size, dtype=p.dtype).unsqueeze(1) - p)
    else:
        spread = root * signs(DRAWS, size).double()
        probes = (spread - p * spread.sum(dim=2, keepdim=True)) / DRAWS**0.5
    return cast(Tensor, probes.float())
