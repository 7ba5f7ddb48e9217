"""The selection of exact scores at a small share of their cost: `fisher` everywhere, `kl` where it decides.

Units far from a cut stay or leave whatever the method. Units near it are taken out for real, on a sixteenth of the
images at first; what is measured there is how much `fisher` is wrong about each of them, k_u / f_u on the same images,
since that varies far less from image to image than the scores do. The band around a cut is widened until it holds every
unit that an error of this size could carry over the cut. Then the images are doubled, again and again, each time for
those units only that the error which is left could still carry over: the last ones are measured on all images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toolchain.groups import ChannelGroup, Widths
from toolchain.scores.cuts import Cut, cut_of
from toolchain.scores.exact import exact_kl
from toolchain.scores.fisher import fisher

DOUBLINGS = 4
"""The first images are 1/2^4 of the proxy set (but 8 at least)."""

BAND = 0.03
"""First half-width of the band, as a share of the units that a cut chooses among."""

CERTAIN = 2.5
"""Standard errors between a unit and the cut at which it is no longer measured."""

SMALL = 16
"""Groups of up to so many units (heads) are measured whole: they cost little, and one error weighs much."""

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
    parts = doubling(images, seed)
    by_fisher = [
        fisher(model, groups, torch.split(part, batch_size), scale, seed + number, quiet)
        for number, part in enumerate(parts)
    ]
    halves = {group.name: torch.stack([found[group.name] for found in by_fisher]).sum(dim=0) for group in groups}
    bands = {group.name: Band(halves[group.name].sum(dim=0) / len(images), cut_of(group, cuts)) for group in groups}
    for level, part in enumerate(parts):
        while wanted := {name: units for name, band in bands.items() if (units := band.wanted(level))}:
            exact = exact_kl(model, groups, torch.split(part, rows), scale, wanted, rows, quiet)
            for name, units in wanted.items():
                bands[name].add(level, units, exact[name][:, units], by_fisher[level][name][:, units])
    return {name: band.scores() for name, band in bands.items()}, halves


def doubling(images: Tensor, seed: int) -> list[Tensor]:
    """The images in random parts, the first two equally large, every other as large as all before it together."""
    bounds = [len(images)]
    while len(bounds) <= DOUBLINGS and bounds[0] >= 16:
        bounds.insert(0, bounds[0] // 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return [images[order[a:b].sort().values] for a, b in zip([0, *bounds], bounds, strict=False)]


class Band:
    """The units of one group, what is known about each, and which of them could still change sides."""

    def __init__(self, fisher_scores: Tensor, cut: Cut) -> None:
        """Start from `fisher` scores [size] in mean nats per image."""
        self._fisher, self._cut = fisher_scores.clamp_min(TINY), cut
        self._exact = torch.zeros(2, len(fisher_scores), dtype=torch.float64)
        self._same = torch.zeros_like(self._exact)  # fisher's share of the images that a unit was taken out on
        self._level = torch.full((len(fisher_scores),), -1)

    def wanted(self, level: int) -> list[int]:
        """Units to take out on the images of this level, ascending; empty when those that matter have been."""
        todo = self._level == level - 1
        if len(todo) > SMALL:
            if bool((self._level >= 0).any()):
                todo &= self._within(CERTAIN * self._error(level))
            else:
                todo = self._around()
        return todo.nonzero().flatten().tolist()

    def add(self, level: int, units: Sequence[int], exact: Tensor, same: Tensor) -> None:
        """Take in sums [2, units] over the images of a level, exact and by `fisher`."""
        chosen = list(units)
        self._exact[:, chosen] += exact.clamp_min(TINY)
        self._same[:, chosen] += same.clamp_min(TINY)
        self._level[chosen] = level

    def scores(self) -> Tensor:
        """The best estimate for every unit [size]: exact, corrected by its own error of `fisher`, or by the group's."""
        seen = self._level >= 0
        ratios = self._exact.sum(dim=0) / self._same.sum(dim=0)
        return self._fisher * torch.where(seen, ratios, ratios[seen].median() if seen.any() else 1.0)

    def _around(self) -> Tensor:
        """The units next to the cut by rank."""
        ranks = self._pools().argsort(dim=1, descending=True).argsort(dim=1)
        reach = max(2, math.ceil(BAND * ranks.shape[1]))
        return ((ranks >= self._cut.keep - reach) & (ranks < self._cut.keep + reach)).flatten()

    def _within(self, distance: float) -> Tensor:
        """The units whose score is less than e^distance times above or below the cut."""
        logs = self._pools().log()
        ordered = logs.sort(dim=1, descending=True).values
        cut = (ordered[:, self._cut.keep - 1] + ordered[:, min(self._cut.keep, logs.shape[1] - 1)]) / 2
        return ((logs - cut.unsqueeze(1)).abs() <= distance).flatten()

    def _error(self, level: int) -> float:
        """Standard error of log scores: at first of `fisher`'s, then of those measured on the images so far."""
        seen = self._level >= max(0, level - 1)
        exact, same = self._exact[:, seen], self._same[:, seen]
        if level == 0:
            return float((exact.sum(dim=0) / same.sum(dim=0)).log().std(correction=0))
        halves = (exact / same).log()
        return float((halves[0] - halves[1]).square().mean().sqrt()) / 2

    def _pools(self) -> Tensor:
        return self.scores().view(self._cut.pools, -1)
