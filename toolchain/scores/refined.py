"""The selection of exact scores at a small share of their cost: `fisher` everywhere, `kl` where it decides.

Units far from a cut stay or leave whatever the method. Units near it are taken out for real, on a few of the images:
what is measured there is how much `fisher` is wrong about each of them, k_u / f_u on the same images, and that ratio
varies far less from image to image than the scores do. The band around a cut is widened until the units that were added
last are all on the side where `fisher` had them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from toolchain.groups import ChannelGroup, Widths
from toolchain.scores.cuts import Cut, cut_of
from toolchain.scores.exact import exact_kl
from toolchain.scores.fisher import fisher

CHECK_IMAGES = 16
"""Images on which units near a cut are taken out."""

BAND = 0.05
"""First half-width of the band, as a share of the units that the cut chooses among."""

LEAST = 4
"""The least half-width in units."""


def refined(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    scale: float | None,
    seed: int,
    cuts: Widths | None,
    quiet: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores whose order around every cut is that of `kl`.

    Args:
        model: the dense network in eval mode.
        groups: its groups.
        batches: the proxy set.
        scale: see `divergence`.
        seed: of the label probes.
        cuts: widths that the plan is going to keep; half of every group by default.
        quiet: no progress bar.

    Returns:
        Group name -> scores [size] (mean nats per image) and group name -> `fisher` sums [2, size] on both halves.
    """
    halves = fisher(model, groups, batches, scale, seed, quiet)
    count = sum(len(batch) for batch in batches)
    images = torch.cat(list(batches))
    checked = images[:: max(1, count // CHECK_IMAGES)][:CHECK_IMAGES]
    fewer = fisher(model, groups, torch.split(checked, len(batches[0])), scale, seed + 1, quiet)
    bands = {
        group.name: _Band(halves[group.name].sum(dim=0) / count, fewer[group.name].sum(dim=0), cut_of(group, cuts))
        for group in groups
    }
    while wanted := {name: band.missing() for name, band in bands.items() if band.missing()}:
        exact = exact_kl(model, groups, [checked], scale, wanted, len(batches[0]), quiet)
        for name, units in wanted.items():
            bands[name].add(units, exact[name].sum(dim=0))
    return {name: band.scores() for name, band in bands.items()}, halves
