"""How far two outputs of a network are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.processes.process import shared


def divergence(dense: Tensor, other: Tensor, scale: float | None = None) -> Tensor:
    """KL per image [B] in nats between two outputs [B, C], computed in float64 from fp32 outputs.

    Args:
        dense: the reference's logits, or its features when `scale` is given.
        other: the changed network's output.
        scale: standard deviation of the features of a network without a classifier; None for logits.
    """
    dense, other = dense.double(), other.double()
    if scale is not None:
        gap: Tensor = (dense - other).square().sum(dim=1)
        return gap / (2 * scale**2)
    log_p, log_q = dense.log_softmax(dim=1), other.log_softmax(dim=1)
    kl: Tensor = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return kl


def output_scale(model: nn.Module, batches: Sequence[Tensor]) -> float | None:
    """None for a classifier; for features (and a single logit, whose softmax tells nothing), their standard deviation
    over the proxy set. Refuses NaN early."""
    return scale_of(model, outputs_on(model, batches))


def outputs_on(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Outputs [N, C] float32 on all images, on the CPU; processes share the batches.

    Raises:
        UserError: they are not finite.
    """
    process = shared()
    with torch.inference_mode():
        own = {number: model(batch.to(device_of(model))).float().cpu() for number, batch in process.mine(batches)}
    outputs = torch.cat(process.all_of(own))
    require_finite(outputs)
    return outputs


def require_finite(outputs: Tensor) -> None:
    """Refuses outputs [N, C] of the dense network that are no numbers.

    Raises:
        UserError: says on how many images.
    """
    if not torch.isfinite(outputs).all():
        bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
        raise UserError(
            f"The dense network gives NaN or infinity on {bad} of {len(outputs)} images.",
            why="Importance is a change of its output, which must be a number.",
            fix="Check the weights and the normalisation of the images.",
        )


def scale_of(model: nn.Module, outputs: Tensor) -> float | None:
    """`output_scale` from the outputs [N, C]."""
    if getattr(model, "num_classes", 0) > 1:
        return None
    if len(outputs) < 2:
        raise UserError("One image is not enough to score a network without a head.", fix="Give at least two.")
    return float(outputs.std(dim=0).square().mean().sqrt().clamp_min(1e-12))


def half_sums(per_image: Tensor, number: int) -> Tensor:
    """Sums [2, ...] over every second image of [B, ...]; `number` of the batch tells which half the first one is in."""
    return torch.stack([per_image[number % 2 :: 2].sum(dim=0), per_image[1 - number % 2 :: 2].sum(dim=0)])


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
