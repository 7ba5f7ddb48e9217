"""Loss curves that are measured: what the output loses when many units of a group leave at once.

Scores hold for units that leave one at a time. Units that carry the same signal lose little each and much together, so
the sum of scores can be far too low, and by different factors in different groups. A few joint removals per group,
masked in the dense network, put that right; between them the curve keeps the shape that the scores give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calib_data.progress import watched
from toolchain.families import groups_of
from toolchain.masks import masked
from toolchain.planning.curves import Curve, curve_of
from toolchain.planning.document import Component
from toolchain.planning.request import groups_to_cut
from toolchain.scores import Scores, divergence
from toolchain.scores.divergence import device_of, output_scale

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of a group's units at which the joint loss is measured."""


def measured_curves(
    model: nn.Module,
    scores: Scores,
    images: Tensor,
    *,
    components: Sequence[Component],
    shares: Sequence[float] = SHARES,
    batch_size: int = 32,
    quiet: bool = True,
) -> dict[str, Curve]:
    """The curves of all groups that may be cut, through measured joint losses.

    Args:
        model: the dense network, in eval mode.
        scores: decide the order in which units leave; of any method.
        images: [N, 3, H, W], normalised as the network expects; labels are not needed.
        components: which groups.
        shares: of a group's units, rising, where the loss is measured: one forward pass per share, group and image.
        batch_size: images per pass.
        quiet: no progress bar.

    Returns:
        Group name -> curve, for `plan(..., planner="global", curves=...)`.
    """
    groups = groups_to_cut(groups_of(model), components)
    batches = torch.split(images.to(device_of(model)), batch_size)
    scale = output_scale(model, batches)
    found = {}
    with torch.inference_mode():
        dense = [model(batch) for batch in batches]
        for group in watched(groups, "Measuring joint losses", quiet=quiet, total=len(groups)):
            spread = group.num_heads if group.kind in ("attention", "qk", "v") else 1
            curve = curve_of(scores.values[group.name], spread)
            counts = sorted({int(group.size * share / spread + 0.5) * spread for share in shares} - {0, group.size})
            losses = []
            for count in counts:
                keep = torch.ones(group.size, device=device_of(model))
                keep[curve.order[:count]] = 0
                total = 0.0
                for batch, reference in zip(batches, dense, strict=True):
                    with masked(model, [group], {group.name: keep.expand(len(batch), -1)}):
                        total += float(divergence(reference, model(batch), scale).sum())
                losses.append(total / len(images))
            found[group.name] = Curve(curve.order, through_points(curve.loss, counts, losses))
    return found


def through_points(loss: Tensor, counts: Sequence[int], losses: Sequence[float]) -> Tensor:
    """A curve that has the given losses at some counts, and between them the shape of another one.

    Args:
        loss: the curve with the shape, [size + 1], not falling.
        counts: numbers of units that are gone, rising, each in 1 .. size - 1.
        losses: at these counts; where they fall, the larger one before holds.

    Returns:
        [size + 1] float64, not falling; beyond the last count it goes on as steep, relative to the shape, as before.
    """
    result = torch.zeros_like(loss, dtype=torch.float64)
    start, reached = 0, 0.0
    slope = 1.0
    for count, value in [*zip(counts, losses, strict=True), (len(loss) - 1, None)]:
        rise = (loss[start : count + 1] - loss[start]).double()
        if not rise[-1] > 0:
            rise = torch.arange(len(rise), dtype=torch.float64)
        level = reached + slope * float(rise[-1]) if value is None else max(reached, value)
        result[start : count + 1] = reached + rise / rise[-1] * (level - reached)
        slope = (level - reached) / float(rise[-1])
        start, reached = count, level
    return result
