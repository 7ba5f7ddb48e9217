"""The importance scores as published: one masked network per unit, the dense logits computed again every time.

UP-ViTs (arXiv 2111.15127, section 3.2) and its official code, without that code's errors (fp16, misread scores). Slow
on purpose: the baseline of `benchmarks.scoring_speed` and the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from upvits.toolchain.families import groups_of
from upvits.toolchain.scores import divergence
from upvits.toolchain.scores.masks import masked


def published_kl(
    model: nn.Module, images: Tensor, units: Mapping[str, Sequence[int]], batch_size: int, scale: float | None = None
) -> dict[str, Tensor]:
    """Mean KL(dense || without the unit) in nats over the images.

    Args:
        model: the dense network in eval mode.
        images: the proxy set [N, 3, H, W].
        units: group name -> units to measure.
        batch_size: images per pass.
        scale: standard deviation of the features of a network without a classifier.

    Returns:
        Group name -> float64 [len(units[name])].
    """
    groups = [group for group in groups_of(model) if group.name in units]
    values = {group.name: torch.zeros(len(units[group.name]), dtype=torch.float64) for group in groups}
    with torch.inference_mode():
        for group in groups:
            for position, unit in enumerate(units[group.name]):
                for batch in torch.split(images, batch_size):
                    mask = torch.ones(len(batch), group.size, dtype=images.dtype)
                    mask[:, unit] = 0
                    with masked(model, groups, {group.name: mask}):
                        without = model(batch)
                    values[group.name][position] += divergence(model(batch), without, scale).sum()
    return {name: value / len(images) for name, value in values.items()}
