"""Agreement of scores on two halves of a proxy set."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.variants import VARIANTS, make, pictures
from upvits import toolchain
from upvits.toolchain.scores import Stability, unstable
from upvits.toolchain.scores.cuts import Cut
from upvits.toolchain.scores.stability import kept_overlap, spearman, stability_of
from upvits.toolchain.structure.groups import ChannelGroup


def test_spearman_knows_ties_and_constants() -> None:
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 900])) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 3])) == pytest.approx(0.866, abs=1e-3)
    assert spearman(torch.ones(3), torch.tensor([1.0, 2, 3])) == 1


def test_overlap_is_the_share_of_kept_units() -> None:
    a, b = torch.tensor([9.0, 8, 7, 1, 2, 3]), torch.tensor([9.0, 8, 1, 7, 2, 3])
    assert kept_overlap(a, b, Cut(1, 3)) == pytest.approx(2 / 3)
    assert kept_overlap(a, b, Cut(2, 1)) == pytest.approx(1 / 2)


def test_groups_that_change_with_the_images_are_listed_worst_first() -> None:
    found = {"a": Stability(0.9, 0.75, 8), "b": Stability(0.9, 0.8, 8), "c": Stability(0.1, 0.5, 8)}
    assert unstable(found) == ["c", "a"]


def test_unmeasured_groups_have_no_stability() -> None:
    groups = [ChannelGroup(name, "ffn", 4, (), ()) for name in ("whole", "sampled")]
    halves = {"whole": torch.rand(2, 4), "sampled": torch.tensor([[1.0, torch.nan, 2, 3]] * 2)}
    assert list(stability_of(groups, halves, None)) == ["whole"]


def test_equal_halves_agree_and_noise_does_not() -> None:
    model = make(VARIANTS[0])
    images = pictures(VARIANTS[0], 4)
    twice = images.repeat_interleave(2, dim=0)  # both halves hold the same images
    assert all(found.overlap == 1 for found in toolchain.score(model, twice).stability.values())
    few = toolchain.score(model, images[:2]).stability
    assert min(found.overlap for found in few.values()) < 1
    assert few["blocks.0.mlp"].kept == 96
    one = toolchain.score(model, images[:1])
    assert one.stability == {}
    assert one.halves == {}
