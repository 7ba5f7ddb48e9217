"""Gradients of a network's output, segment by segment from the last one to the first.

Autograd through a whole network keeps what every layer computed. Here a first pass keeps the stream between segments
only, and every segment runs again when its turn has come: one more forward pass, and the memory of one block instead of
all blocks (Chen et al. 2016, arXiv 1604.06174, with the network's own segments).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from upvits.calib_data.loading import stream as seed_of
from upvits.toolchain.families import segments_of
from upvits.toolchain.scores.divergence import device_of
from upvits.toolchain.structure.segments import Segment

Signs: TypeAlias = Callable[[int, int], Tensor]
"""(K, C) -> [K, B, C] of 1 and -1 for the B images of a pass."""


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the weights and wants no gradients for them, also made in inference mode."""
    with torch.inference_mode(False):
        shared_weights = {
            id(parameter): nn.Parameter(plain(parameter), requires_grad=False) for parameter in model.parameters()
        }
        return copy.deepcopy(model, shared_weights).eval()


def plain(tensor: Tensor) -> Tensor:
    """The tensor as autograd takes it, also where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def signs_of(seed: int, positions: Sequence[int]) -> Signs:
    """Random signs for images by their position: the same ones whichever batch, part or process has an image."""

    def draw(count: int, size: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed_of(seed, position)) for position in positions]
        return torch.stack([torch.randint(0, 2, (count, size), generator=g) for g in generators], dim=1) * 2.0 - 1

    return draw


def gradients_by_segment(
    model: nn.Module, images: Tensor, directions: Callable[[Tensor], Tensor], leaves: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Run images through a network and some directions of its output back.

    Args:
        model: a `frozen` network of a supported family.
        images: [B, 3, H, W].
        directions: outputs [B, C] -> [K, B, C]; called once.
        leaves: what to differentiate by. It is looked at after each segment has run with gradients on, so hooks of the
            network may put tensors in.

    Yields:
        For every segment, the last one first: name of a leaf -> the gradients [K, ...] that reach it in this segment.
        Gradients of a leaf that several segments use have to be summed.
    """
    *body, head = segments_of(model)
    with torch.inference_mode(False), torch.no_grad():
        streams = [plain(images.to(device_of(model)))]
        for segment in body:
            streams.append(segment.run(streams[-1]))
    slopes: Sequence[Tensor] | None = None
    for segment in (head, *reversed(body)):
        slopes, found = _back(segment, streams.pop(), bool(streams), slopes, directions, leaves)
        if found is None:  # nothing in this segment, the first one, depends on a leaf
            return
        yield found


def _back(
    segment: Segment,
    stream: Tensor,
    goes_on: bool,
    slopes: Sequence[Tensor] | None,
    directions: Callable[[Tensor], Tensor],
    leaves: Mapping[str, Tensor],
) -> tuple[Sequence[Tensor], dict[str, Tensor] | None]:
    """One segment: the gradients of what enters it, and of the leaves."""
    with torch.inference_mode(False), torch.enable_grad():
        outputs = segment.run(stream.requires_grad_(goes_on))
        if slopes is None:
            slopes = list(directions(outputs.detach().float()).to(outputs))
        if not outputs.requires_grad:
            return (), None
        wanted = [stream, *leaves.values()] if goes_on else list(leaves.values())
        found = [
            torch.autograd.grad(outputs, wanted, slope, retain_graph=number + 1 < len(slopes), allow_unused=True)
            for number, slope in enumerate(slopes)
        ]
        by_leaf = zip(leaves, zip(*(one[int(goes_on) :] for one in found), strict=True), strict=True)
        reached = {name: torch.stack(parts) for name, parts in by_leaf if parts[0] is not None}
        return [one[0] for one in found] if goes_on else (), reached
