"""Scores that need no images: magnitude and random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from upvits.toolchain.structure.groups import ChannelGroup


def magnitude(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """L2 norm over everything that a unit owns."""
    state = model.state_dict()
    values = {}
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for piece in group.slices:
            rows = state[piece.parameter].detach().cpu().double().movedim(piece.axis, 0)
            energy = rows.square().flatten(1).sum(dim=1) if rows.ndim > 1 else rows.square()
            energy = energy.narrow(0, piece.start, piece.repeat * group.size * piece.unit)
            total += energy.view(piece.repeat, group.size, piece.unit).sum(dim=(0, 2))
        values[group.name] = total.sqrt()
    return values


def random_scores(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups}
