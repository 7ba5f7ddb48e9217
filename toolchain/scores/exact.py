"""Scores by the definition: take every unit out and look at the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from calib_data.progress import watched
from toolchain.groups import ChannelGroup
from toolchain.masks import masked
from toolchain.scores.divergence import device_of, divergence


def exact_kl(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    scale: float | None,
    units: Mapping[str, Sequence[int]] | None,
    quiet: bool,
) -> dict[str, Tensor]:
    """One masked forward pass per unit and batch; the dense outputs are computed once per batch."""
    wanted = units if units is not None else {group.name: range(group.size) for group in groups}
    work = [(group, unit) for group in groups for unit in wanted.get(group.name, ())]
    values = {group.name: torch.full((group.size,), torch.nan, dtype=torch.float64) for group in groups}
    for group, unit in work:
        values[group.name][unit] = 0.0
    with torch.inference_mode():
        dense = [model(batch.to(device_of(model))) for batch in batches]
        for group, unit in watched(work, "Scoring units (kl)", quiet=quiet):
            for batch, reference in zip(batches, dense, strict=True):
                mask = torch.ones(len(batch), group.size, device=device_of(model))
                mask[:, unit] = 0
                with masked(model, groups, {group.name: mask}):
                    output = model(batch.to(device_of(model)))
                values[group.name][unit] += divergence(reference, output, scale).sum().item()
    count = sum(len(batch) for batch in batches)
    return {name: value / count for name, value in values.items()}
