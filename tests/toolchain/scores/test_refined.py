"""`refined`: the selection of `kl` without taking every unit out."""

from __future__ import annotations

import pytest
import torch

from upvits.toolchain.scores.cuts import Cut, cut_of
from upvits.toolchain.scores.refined import Band, doubling, heaviest_first
from upvits.toolchain.structure.groups import ChannelGroup, Widths


def group(kind: str, size: int, heads: int = 1, name: str = "blocks.0.attn") -> ChannelGroup:
    return ChannelGroup(name=name, kind=kind, size=size, slices=(), masks=(), num_heads=heads)  # type: ignore[arg-type]


def test_cuts_are_per_head_or_per_run_of_merged_heads() -> None:
    attention, heads = group("attention", 48, 4), group("heads", 4, 4, "blocks.0.attn.heads")
    assert cut_of(attention, None) == Cut(4, 6)
    assert cut_of(attention, Widths({"blocks.0.attn": 32}, {"blocks.0.attn": 4})) == Cut(4, 8)
    assert cut_of(attention, Widths({"blocks.0.attn": 24}, {"blocks.0.attn": 2})) == Cut(2, 12)
    assert cut_of(heads, Widths({"blocks.0.attn": 36}, {"blocks.0.attn": 3})) == Cut(1, 3)
    assert cut_of(group("qk", 48, 4, "blocks.0.attn.qk"), None) == Cut(4, 6)
    assert cut_of(group("ffn", 40), Widths({"blocks.0.attn": 40})) == Cut(1, 20)


def test_kept_units_are_the_best_of_their_pool() -> None:
    kept = Cut(2, 1).kept(torch.tensor([5.0, 6.0, 1.0, 1.0]))
    assert kept.tolist() == [False, True, True, False]


@pytest.mark.parametrize(("count", "bounds"), [(64, [0, 2, 4, 8, 16, 32, 64]), (20, [0, 2, 5, 10, 20]), (1, [0, 1])])
def test_parts_of_the_images_double(count: int, bounds: list[int]) -> None:
    assert doubling(count) == bounds


def test_the_image_that_scores_come_from_is_first() -> None:
    even, heavy = torch.ones(4, 3), torch.tensor([[1e-6, 5e-6, 1e-6]])
    assert heaviest_first({"large": even, "small": heavy}).tolist() == [1, 0, 2]


def measured(seed: int, size: int, error: float, noise: float, images: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-image scores [size, images]: exact ones, and `fisher` with an error of its own per unit."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(size, 1, generator=generator, dtype=torch.float64).mul(6).exp()
    shared = torch.randn(images, generator=generator, dtype=torch.float64).mul(1.5).exp().sort(descending=True).values
    exact = scores * shared * (noise * torch.randn(size, images, generator=generator, dtype=torch.float64)).exp()
    wrong = (error * torch.randn(size, 1, generator=generator, dtype=torch.float64)).exp()
    return exact, scores * shared * wrong


def refine(exact: torch.Tensor, by_fisher: torch.Tensor, cut: Cut) -> tuple[torch.Tensor, float]:
    """Sums [size], and the share of the exact scores that they took."""
    band, work = Band(by_fisher.float(), cut), 0
    bounds = doubling(exact.shape[1])
    while wanted := band.to_measure():
        for level, units in wanted.items():
            part = exact[units, bounds[level] : bounds[level + 1]]
            band.add(level, units, part)
            work += part.numel()
    return band.sums(), work / exact.numel()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("error", "most"), [(0.02, 0.03), (0.1, 0.08), (0.5, 0.3)])
def test_the_selection_is_that_of_exact_scores_for_less(seed: int, error: float, most: float) -> None:
    exact, by_fisher = measured(seed, 512, error, noise=0.3)
    cut = Cut(1, 256)
    sums, work = refine(exact, by_fisher, cut)
    wanted = cut.kept(exact.sum(dim=1))
    kept, by_fisher_alone = (int((cut.kept(x) & wanted).sum()) for x in (sums, by_fisher.sum(dim=1)))
    assert kept >= max(0.98 * 256, by_fisher_alone)
    assert work < most


def test_units_are_chosen_head_by_head() -> None:
    exact, by_fisher = measured(0, 64, error=0.3, noise=0.1)
    cut = Cut(4, 8)
    sums, work = refine(exact, by_fisher, cut)
    assert torch.equal(cut.kept(sums), cut.kept(exact.sum(dim=1)))
    assert work < 0.6


def test_a_group_without_a_cut_costs_nothing() -> None:
    exact, by_fisher = measured(0, 1, error=1.0, noise=0.3)
    assert refine(exact, by_fisher, Cut(1, 1))[1] == 0


def test_scores_that_are_not_numbers_come_to_an_end() -> None:
    exact, by_fisher = measured(0, 32, error=0.3, noise=0.3)
    sums, _ = refine(torch.full_like(exact, torch.nan), by_fisher, Cut(1, 16))
    assert sums.isnan().any()
