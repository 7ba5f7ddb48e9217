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
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from upvits.calib_data.prepared import ImageSet, tensor_of
from upvits.calib_data.progress import watched
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.cuts import Cut, cut_of
from upvits.toolchain.scores.divergence import device_of
from upvits.toolchain.scores.exact import kl_per_image
from upvits.toolchain.scores.fisher import fisher_per_image
from upvits.toolchain.scores.room import images_at_once, with_room
from upvits.toolchain.scores.suffix import chain_of
from upvits.toolchain.structure.groups import ChannelGroup, Widths

FIRST = 2
"""Images that a unit is measured on at first, at least."""

PROBED = 16
"""Units around the cuts of a group that are measured first, to see how wrong `fisher` is about such units."""

DIRECTIONS = 6
"""Of the output, in which `fisher` looks: enough for all but a percent or two, and what it misses is measured here."""

WRONG = 0.003
"""Share of the kept units that may be expected to be the wrong ones when a group is done."""

SHARE = 0.5
"""A round leaves this share of the doubt that is allowed to units that it does not measure."""

FEWEST = 8
"""Units that must have been measured twice before their second ratios are predicted from their first."""

LEAST_ERROR = 0.02
"""Standard error of log ratios that is assumed at least: few equal ratios prove little."""

SLOPE = 1.7
"""Of the logistic function that is closest to the normal distribution's; its tails are heavier, as those of ratios."""

TINY = 1e-30


def refined(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: ImageSet,
    scale: float | None,
    *,
    seed: int,
    cuts: Widths | None,
    batch_size: int,
    rows: int,
    quiet: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores whose order around every cut is that of `kl`.

    Holds two float32 per unit and image: 0.1 GB per 100 images for DeiT-B.

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
    bounds = doubling(len(images))
    bands = {group.name: Band(shares.pop(group.name)[:, order], cut_of(group, cuts)) for group in groups}
    with torch.inference_mode():
        chain = chain_of(model, groups, tensor_of(images[:2]).to(device_of(model)))
    for requests in watched(_rounds(bands), "Scoring units (kl around the cuts)", quiet=quiet):
        for level, units in requests.items():
            start, end = bounds[level : level + 2]
            scores = kl_per_image(model, groups, chain, images[start:end], scale, units, rows)
            for name, chosen in units.items():
                bands[name].add(level, chosen, scores[name])
    return {name: band.sums() / len(images) for name, band in bands.items()}, halves


def doubling(count: int) -> list[int]:
    """Bounds of the parts that images are measured in, [0, ..., count]: each but the first as large as all before."""
    bounds = [count]
    while bounds[0] >= 2 * FIRST:
        bounds.insert(0, bounds[0] // 2)
    return [0, *bounds]


def heaviest_first(shares: Mapping[str, Tensor]) -> Tensor:
    """Order of the images [N] by the part of the units' scores that they carry, from shares [size, N]."""
    weights = [(f / f.sum(dim=1, keepdim=True).clamp_min(TINY)).double().sum(dim=0) for f in shares.values()]
    return torch.stack(weights).sum(dim=0).argsort(descending=True, stable=True)


def _fisher_of_all(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: ImageSet,
    scale: float | None,
    seed: int,
    batch_size: int,
    quiet: bool,
) -> dict[str, Tensor]:
    """Group name -> `fisher` of every image, float32 [size, N]."""

    def parts_of(size: int) -> dict[int, dict[str, Tensor]]:
        found = fisher_per_image(model, groups, images, scale, batch_size, size, seed, quiet, DIRECTIONS)
        return {first: {n: values.T.float().cpu() for n, values in scores.items()} for first, scores in found}

    everything = shared().all_of(
        with_room(parts_of, images_at_once(model, tensor_of(images[:1]).to(device_of(model)), batch_size))
    )
    return {group.name: torch.cat([part[group.name] for part in everything], dim=1) for group in groups}


def _rounds(bands: Mapping[str, Band]) -> Iterator[dict[int, dict[str, list[int]]]]:
    """What to measure next, until nothing is in doubt: part of the images -> group name -> units."""
    while True:
        requests: dict[int, dict[str, list[int]]] = {}
        for name, band in bands.items():
            for level, units in band.to_measure().items():
                requests.setdefault(level, {})[name] = units
        if not requests:
            return
        yield requests


class Band:
    """The units of one group: what is known about each, and which of them could be on the wrong side of the cut."""

    def __init__(self, fisher: Tensor, cut: Cut) -> None:
        """Start from `fisher` of every image [size, N], the heaviest images first."""
        size, count = fisher.shape
        self._cut, self._bounds = cut, torch.tensor(doubling(count))
        self._fisher = fisher.clamp_min(TINY)
        self._exact = torch.zeros_like(self._fisher)
        self._level = torch.zeros(size, dtype=torch.long)  # parts of the images that a unit was measured on

    def to_measure(self) -> dict[int, list[int]]:
        """Units to measure, ascending, by the part of the images that is next for them; empty when all is clear."""
        if self._cut.keep * self._cut.pools == len(self._level):
            return {}
        chosen = self._doubtful() if (self._level > 0).any() else self._around()
        levels = self._level[chosen]
        return {level: chosen[levels == level].tolist() for level in sorted(set(levels.tolist()))}

    def add(self, level: int, units: Sequence[int], kl: Tensor) -> None:
        """Take in the exact KL [units, images] on one part of the images."""
        chosen = torch.tensor(list(units))
        start, end = self._bounds[level : level + 2].tolist()
        self._exact[chosen, start:end] = kl.float().clamp_min(TINY)
        self._level[chosen] = level + 1

    def sums(self) -> Tensor:
        """The best estimate of every unit's sum over the images [size], float64."""
        return self._estimate()[0]

    def _around(self) -> Tensor:
        """The units next to the cut by `fisher`."""
        ranks = self._pools(self._fisher.double().sum(dim=1)).argsort(dim=1, descending=True).argsort(dim=1)
        reach = max(2, math.ceil(PROBED / 2 / self._cut.pools))
        return ((ranks >= self._cut.keep - reach) & (ranks < self._cut.keep + reach)).flatten().nonzero().flatten()

    def _doubtful(self) -> Tensor:
        """The most doubtful units, so many that the doubt about all others is but a share of what is allowed."""
        doubt = self._doubt()
        allowed = 2 * WRONG * self._cut.keep * self._cut.pools  # a unit that stays wrongly pushes another one out
        if doubt.sum() <= allowed:
            return torch.empty(0, dtype=torch.long)
        ordered = doubt.sort(descending=True)
        left = ordered.values.sum() - ordered.values.cumsum(0)
        count = 1 + int((left > SHARE * allowed).sum())
        return ordered.indices[:count].sort().values

    def _doubt(self) -> Tensor:
        """Probability of being on the wrong side of the cut [size]; log-logistic errors of what is not measured."""
        values, known, error = self._estimate()
        ordered = self._pools(values).sort(dim=1, descending=True).values
        cut = (ordered[:, self._cut.keep - 1] * ordered[:, self._cut.keep]).sqrt()
        missing = (
            cut.repeat_interleave(ordered.shape[1]) - known
        )  # what the unmeasured part must be for the unit to be at the cut
        unmeasured = (values - known).clamp_min(TINY)
        above = torch.sigmoid(SLOPE * (unmeasured.log() - missing.clamp_min(TINY).log()) / error)
        above = torch.where(missing <= 0, 1.0, above)
        doubt = torch.where(self._cut.kept(values), 1 - above, above)
        return torch.where(self._level == len(self._bounds) - 1, 0.0, doubt)

    def _estimate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Estimated sums, their measured part, and the standard error of the log of the other part [size]."""
        known, same = self._totals(self._level)
        unmeasured = self._fisher.double().sum(dim=1) - same
        seen = self._level > 0
        if not seen.any():
            return unmeasured, known, torch.ones_like(unmeasured)
        before, same_before = self._totals((self._level - 1).clamp_min(0))
        last = ((known - before) / (same - same_before).clamp_min(TINY)).log()  # log k / f on the latest part
        middle = float(last[seen].quantile(0.5))
        ratio, error = torch.full_like(unmeasured, middle), torch.full_like(unmeasured, _spread(last[seen] - middle))
        twice = self._level > 1
        if int(twice.sum()) >= FEWEST:  # how far do the first ratios of a unit predict its next ones?
            first = (before / same_before.clamp_min(TINY)).log()[twice]
            x, y = first - first.median(), last[twice] - last[twice].median()
            slope = float(((x * y).sum() / x.square().sum().clamp_min(TINY)).clamp(0, 1))
            log_ratio = (known / same.clamp_min(TINY)).log()
            ratio = torch.where(seen, middle + slope * (log_ratio - log_ratio[seen].median()), ratio)
            error = torch.where(seen, _spread(y - slope * x), error)
        return known + ratio.exp() * unmeasured.clamp_min(0), known, error

    def _totals(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of exact KL and of `fisher` over the first parts of the images [size], float64."""
        measured = torch.arange(self._fisher.shape[1]) < self._bounds[level].unsqueeze(1)
        exact, fisher = (torch.where(measured, values, 0.0) for values in (self._exact, self._fisher))
        return exact.double().sum(dim=1), fisher.double().sum(dim=1)

    def _pools(self, values: Tensor) -> Tensor:
        return values.view(self._cut.pools, -1)


def _spread(errors: Tensor) -> float:
    """Standard error from errors [n]; hardly to be told from few."""
    return max(LEAST_ERROR if len(errors) >= FEWEST else 1.0, float(errors.square().mean().sqrt()))
