"""Whether a proxy set is large enough: do scores on its two halves agree?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upvits.toolchain.scores.cuts import Cut, cut_of
from upvits.toolchain.structure.groups import ChannelGroup, Widths

STABLE = 0.8
"""Below this, a group's selection depends on the draw of the images (published 5k proxies reach 0.50 to 0.71 in late
FFN layers, see UP-ViTs' rank files)."""


@dataclass(frozen=True, slots=True)
class Stability:
    """Agreement of the scores of one group on two disjoint halves of the proxy set.

    Attributes:
        spearman: rank correlation.
        overlap: share of the units that one half keeps which the other keeps too.
        kept: how many units are kept there.
    """

    spearman: float
    overlap: float
    kept: int


def stability_of(
    groups: Sequence[ChannelGroup], halves: Mapping[str, Tensor], widths: Widths | None
) -> dict[str, Stability]:
    """Stability of every group that was measured as a whole.

    Args:
        groups: the network's groups.
        halves: group name -> scores [2, size] on each half.
        widths: what the plan will keep; half of every group by default.
    """
    result = {}
    for group in groups:
        first, second = halves[group.name]
        if torch.isfinite(first).all() and torch.isfinite(second).all():
            cut = cut_of(group, widths)
            result[group.name] = Stability(
                spearman(first, second), kept_overlap(first, second, cut), cut.pools * cut.keep
            )
    return result


def unstable(stability: Mapping[str, Stability]) -> list[str]:
    """Groups whose kept sets overlap by less than 0.8, worst first: their proxy set is too small."""
    weak = [name for name, agreement in stability.items() if not agreement.overlap >= STABLE]
    return sorted(weak, key=lambda name: stability[name].overlap)


def kept_overlap(a: Tensor, b: Tensor, cut: Cut) -> float:
    """Share of the units that scores `a` keep which scores `b` keep too."""
    kept_a, kept_b = cut.kept(a), cut.kept(b)
    return int((kept_a & kept_b).sum()) / int(kept_a.sum())


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two score vectors [n]; 1 where one of them is constant, since nothing can then disagree."""
    correlation = float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]) if len(a) > 1 else 1.0
    return correlation if math.isfinite(correlation) else 1.0


def ranks(values: Tensor) -> Tensor:
    """Ranks [n] in float64, ties averaged."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return middle[inverse]
