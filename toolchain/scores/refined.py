"""The selection of exact scores at a small share of their cost: `fisher` everywhere, `kl` where it decides.

The score of a unit is a sum over images of k, its exact KL. `fisher` gives an estimate f of every term, and k is
measured only where it matters. Few images carry most of the sum (those on which the network is unsure), so terms are
measured from the heaviest image down, and those that are left are taken as f times the ratio k / f seen so far. What
the spread of these ratios makes uncertain is therefore the light rest of a sum only. In each round the units whose
order against the cut is most in doubt get more images, twice as many as before, until hardly any unit is expected to be
on the wrong side of any cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from toolchain.groups import ChannelGroup, Widths
from toolchain.scores.cuts import Cut, cut_of
from toolchain.scores.divergence import device_of
from toolchain.scores.exact import kl_per_image
from toolchain.scores.fisher import fisher_per_image
from toolchain.scores.suffix import chain_of

FIRST = 2
"""Images that a unit is measured on at first, at least."""

PROBED = 16
"""Units around the cuts of a group that are measured first, to see how wrong `fisher` is about such units."""

WRONG = 0.003
"""Share of the kept units that may be expected to be the wrong ones when a group is done."""

SHARE = 0.5
"""A round leaves this share of the doubt that is allowed to units that it does not measure."""

FEWEST = 8
"""Units that must have been measured twice before their second ratios are predicted from their first."""

LEAST_ERROR = 0.02
"""Standard error of log ratios that is assumed at least: few equal ratios prove little."""

TINY = 1e-30


def refined(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: Tensor,
    scale: float | None,
    *,
    seed: int,
    cuts: Widths | None,
    batch_size: int,
    rows: int,
    quiet: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores whose order around every cut is that of `kl`.

    Keeps one float32 per unit and image, and one more for each unit and image of the groups: 0.5 GB for 1,000 images
    and DeiT-B.

    Args:
        model: the dense network in eval mode.
        groups: its groups.
        images: the proxy set [N, 3, H, W].
        scale: see `divergence`.
        seed: of the label probes.
        cuts: widths that the plan is going to keep; half of every group by default.
        batch_size: images per pass of `fisher`.
        rows: images times units per pass of `kl`.
        quiet: no progress bar.

    Returns:
        Group name -> scores [size] (mean nats per image) and group name -> `fisher` sums [2, size] on both halves.
    """
    shares = _fisher_of_all(model, groups, images, scale, seed, batch_size, quiet)
    halves = {name: torch.stack([f[:, i::2].double().sum(dim=1) for i in (0, 1)]) for name, f in shares.items()}
    order = heaviest_first(shares)
    images = images[order]
    bands = {group.name: Band(shares.pop(group.name)[:, order], cut_of(group, cuts)) for group in groups}
    with torch.inference_mode():
        chain = chain_of(model, groups, images[:2].to(device_of(model)))
    while wanted := {name: units for name, band in bands.items() if (units := band.wanted())}:
        for level, (start, end) in enumerate(pairwise(doubling(len(images)))):
            here = {name: part for name, units in wanted.items() if (part := bands[name].at(level, units))}
            if here:
                found = kl_per_image(model, groups, chain, images[start:end], scale, here, rows)
                for name, units in here.items():
                    bands[name].add(units, found[name])
    return {name: band.sums() / len(images) for name, band in bands.items()}, halves
