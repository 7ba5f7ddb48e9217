"""How much the output depends on what some modules give, token by token: random gradients of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from upvits.calib_data.prepared import ImageSet, in_batches, tensor_of
from upvits.calib_data.progress import watched
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.backward import Signs, gradients_by_segment, signs_of
from upvits.toolchain.scores.divergence import device_of, require_finite
from upvits.toolchain.scores.room import images_at_once

DRAWS = 2
"""Random gradients per image: each covers all classes, and moments are summed over many tokens."""


def parts_of(
    model: nn.Module, images: ImageSet, batch_size: int, size: int, title: str, *, seed: int, quiet: bool
) -> Iterator[tuple[Tensor, Signs]]:
    """This process's images, so many at once, with the random signs of each."""
    for number, batch in watched(shared().mine(in_batches(images, batch_size)), title, quiet=quiet):
        for start in range(0, len(batch), size):
            part, first = batch[start : start + size], number * batch_size + start
            yield part.to(device_of(model)), signs_of(seed, range(first, first + len(part)))


def most_at_once(model: nn.Module, images: ImageSet, batch_size: int) -> int:
    """How many images fit into a pass with gradients, `batch_size` at most."""
    return images_at_once(model, tensor_of(images[:1]).to(device_of(model)), batch_size)


def output_gradients(
    model: nn.Module, names: Sequence[str], images: Tensor, signs: Signs
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Run images through a network, forwards and `DRAWS` times backwards.

    Args:
        model: a `frozen` network.
        names: modules to look at, each of them run once.
        images: [B, 3, H, W].
        signs: of these images.

    Yields:
        For one segment of the network after the other, the last one first: for each of `names` that runs in it, what
        the module gave [B, ..., C], and gradients g [DRAWS, B, ..., C] with E[g g^T] = 2 d^2 KL in expectation: if the
        module gives x + e instead, the output moves by a KL of about 1/2 sum_draws (g . e)^2 nats (for networks without
        classes: by half its squared change).

    Raises:
        UserError: the network gives NaN.
    """
    given: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(_tap(name, given, leaves)))
        for found in gradients_by_segment(model, images, lambda outputs: directions_of(model, outputs, signs), leaves):
            yield {name: (given[name], gradient) for name, gradient in found.items()}
            given.clear()
            leaves.clear()


def _tap(name: str, given: dict[str, Tensor], leaves: dict[str, Tensor]) -> Any:
    """A hook that keeps what a module gives, and a zero added to it whose gradient is that of the output."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        given[name], leaves[name] = output.detach(), torch.zeros_like(output, requires_grad=True)
        return output + leaves[name]

    return hook


def directions_of(model: nn.Module, outputs: Tensor, signs: Signs) -> Tensor:
    """Random directions [DRAWS, B, C] whose outer products sum to the Fisher matrix in expectation.

    That is diag(p) - p p^T for a softmax, and 1 for features.

    Raises:
        UserError: outputs [B, C] are not finite.
    """
    require_finite(outputs)
    drawn = signs(DRAWS, outputs.shape[1])
    if getattr(model, "num_classes", 0) > 1:
        p = outputs.double().cpu().softmax(dim=-1)
        spread = p.sqrt() * drawn
        drawn = spread - p * spread.sum(dim=-1, keepdim=True)
    probes: Tensor = drawn / DRAWS**0.5
    return probes.to(outputs)
