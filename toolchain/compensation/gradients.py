"""How much the output depends on what some modules give, token by token: random gradients of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from upvits.calib_data.progress import watched
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.divergence import device_of
from upvits.toolchain.scores.fisher import drawn_from

DRAWS = 2
"""Random gradients per image: each covers all classes, and moments are summed over many tokens."""


def output_gradients(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], title: str, *, seed: int, quiet: bool
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Run a network over this process's batches, forwards and `DRAWS` times backwards.

    Args:
        model: in eval mode; gets no gradients of its own.
        names: modules to look at, each of them run once.
        batches: images [B, 3, H, W].
        title: of the progress bar.
        seed: for the random gradients.
        quiet: no progress bar.

    Yields:
        For every batch, one pair for each of `names`: what the module gave [B, ..., C], and gradients g
        [DRAWS, B, ..., C] with E[g g^T] = 2 d^2 KL in expectation: if the module gives x + e instead, the output
        moves by a KL of about 1/2 sum_draws (g . e)^2 nats (for networks without classes: by half its squared change).
    """
    with torch.inference_mode(False):
        weights = {name: _plain(parameter) for name, parameter in model.named_parameters()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(_tap(name, seen)))
        for number, batch in watched(shared().mine(batches), title, quiet=quiet):
            with torch.inference_mode(False), torch.enable_grad():
                outputs = functional_call(model, weights, _plain(batch).to(device_of(model)))
                probes = _probes(outputs.detach(), getattr(model, "num_classes", 0) > 1, drawn_from(seed, number))
                leaves = [seen[name][1] for name in names]
                gradients = [
                    torch.autograd.grad((probe * outputs).sum(), leaves, retain_graph=draw + 1 < DRAWS)
                    for draw, probe in enumerate(probes)
                ]
            yield [
                (seen[name][0], torch.stack([gradient[index] for gradient in gradients]))
                for index, name in enumerate(names)
            ]


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as autograd takes it, also where the caller is in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _tap(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """A hook that keeps what a module gives, and a zero added to it whose gradient is that of the output."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaf = torch.zeros_like(output, requires_grad=True)
        seen[name] = (output.detach(), leaf)
        return output + leaf

    return hook


def _probes(outputs: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """Random directions [DRAWS, B, C] whose outer products sum to the Fisher matrix in expectation.

    That is diag(p) - p p^T for a softmax, and 1 for features.
    """
    signs = torch.randint(0, 2, (DRAWS, *outputs.shape), generator=generator) * 2.0 - 1
    if classes:
        p = outputs.double().cpu().softmax(dim=-1)
        spread = p.sqrt() * signs
        signs = spread - p * spread.sum(dim=-1, keepdim=True)
    probes: Tensor = signs / DRAWS**0.5
    return probes.to(outputs)
