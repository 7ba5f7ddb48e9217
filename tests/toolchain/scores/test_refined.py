"""`refined`: the selection of `kl` without taking every unit out."""

from __future__ import annotations

import pytest
import torch

from toolchain.groups import ChannelGroup, Widths
from toolchain.scores.cuts import Cut, cut_of
from toolchain.scores.refined import Band, doubling


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


@pytest.mark.parametrize(("count", "sizes"), [(256, [16, 16, 32, 64, 128]), (20, [10, 10]), (5, [5])])
def test_images_are_doubled_and_each_is_used_once(count: int, sizes: list[int]) -> None:
    parts = doubling(torch.arange(count), 0)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(count))


def measured(seed: int, size: int, error: float, noise: float, images: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-image scores [size, images]: exact ones, and `fisher` with an error of its own per unit."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(size, 1, generator=generator, dtype=torch.float64).mul(6).exp()
    shared = torch.rand(size, images, generator=generator, dtype=torch.float64) * 2  # images differ, for both alike
    exact = scores * shared * (noise * torch.randn(size, images, generator=generator, dtype=torch.float64)).exp()
    wrong = (error * torch.randn(size, 1, generator=generator, dtype=torch.float64)).exp()
    return exact, scores * shared * wrong


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("error", "most"), [(0.05, 0.1), (0.5, 0.5)])
def test_the_selection_is_that_of_exact_scores_for_less(seed: int, error: float, most: float) -> None:
    exact, by_fisher = measured(seed, 512, error, noise=0.3)
    cut = Cut(1, 256)
    band, work = Band(by_fisher.mean(dim=1), cut), 0
    for level, part in enumerate(doubling(torch.arange(256), seed)):
        while units := band.wanted(level):
            chosen = exact[units][:, part], by_fisher[units][:, part]
            sums = [torch.stack([x[:, 0::2].sum(dim=1), x[:, 1::2].sum(dim=1)]) for x in chosen]
            band.add(level, units, *sums)
            work += len(units) * len(part)
    kept, wanted = cut.kept(band.scores()), cut.kept(exact.mean(dim=1))
    assert int((kept & wanted).sum()) >= 0.98 * 256
    assert work / exact.numel() < most
    by_fisher_alone = int((cut.kept(by_fisher.mean(dim=1)) & wanted).sum())
    assert int((kept & wanted).sum()) > by_fisher_alone


def test_small_groups_are_measured_whole_and_exactly() -> None:
    exact, by_fisher = measured(0, 8, error=1.0, noise=0.3)
    band = Band(by_fisher.mean(dim=1), Cut(1, 4))
    for level, part in enumerate(doubling(torch.arange(256), 0)):
        units = band.wanted(level)
        assert units == list(range(8))
        halves = [torch.stack([x[:, part].sum(dim=1) / 2] * 2) for x in (exact, by_fisher)]
        band.add(level, units, *halves)
        assert band.wanted(level) == []
    torch.testing.assert_close(band.scores(), exact.mean(dim=1))
