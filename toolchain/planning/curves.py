"""What a group costs the network's output as its units leave: the one thing that planners need to know of scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Curve:
    """In which order units leave, and the expected loss on the way.

    Attributes:
        order: units, the first to leave first, [size].
        loss: KL to the dense network in nats when the first r units are gone, [size + 1] float64; starts at 0 and
            never falls.
    """

    order: Tensor
    loss: Tensor


def curve_of(values: Tensor, num_heads: int = 1) -> Curve:
    """The curve of independent scores: the lowest leave first, and losses add up.

    Args:
        values: scores [size] in nats.
        num_heads: the units of an attention group leave in turns, one of every head at a time, since heads stay equally
            wide.
    """
    order = values.view(num_heads, -1).sort(dim=1, stable=True).indices
    order = order + torch.arange(num_heads).view(-1, 1) * order.shape[1]
    order = order.T.flatten()
    loss = torch.cat([torch.zeros(1, dtype=torch.float64), values.double()[order].clamp_min(0).cumsum(0)])
    return Curve(order, loss)
