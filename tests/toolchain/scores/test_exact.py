"""`kl` against the procedure as published: one masked network per unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.published import published_kl
from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits.toolchain.families import groups_of
from upvits.toolchain.scores.divergence import output_scale
from upvits.toolchain.scores.exact import exact_kl
from upvits.toolchain.scores.suffix import chain_of

NOISE = 1e-10
"""Nats that fp32 rounding of the outputs of these networks can add to or take from a score."""

READ = {
    "deit_tiny_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "deit3_small_patch16_224": 1,
    "vit_small_patch14_reg4_dinov2": 1,
    "vit_medium_patch16_clip_224": 1,
}


def some_units(model: nn.Module, count: int) -> dict[str, list[int]]:
    return {group.name: list(range(0, group.size, -(-group.size // count))) for group in groups_of(model)}


def check_same_as_published(variant: Variant, dtype: torch.dtype, count: int, tolerance: float) -> None:
    model, images = make(variant).to(dtype), pictures(variant, 3).to(dtype)
    units, groups = some_units(model, count), groups_of(model)
    batches = torch.split(images, 2)  # the last one is smaller, and a pass holds several units of it
    scale = output_scale(model, batches)
    found = exact_kl(model, groups, batches, scale, units, rows=5, quiet=True)
    wanted = published_kl(model, images, units, batch_size=3, scale=scale)
    for name, chosen in units.items():
        mean = found[name].sum(dim=0)[chosen] / len(images)
        torch.testing.assert_close(mean, wanted[name], rtol=tolerance, atol=NOISE, msg=name)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_same_scores_as_published(variant: Variant) -> None:
    check_same_as_published(variant, torch.float32, 3, 1e-3)


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_what_differs_is_rounding(variant: Variant) -> None:
    check_same_as_published(variant, torch.float64, 3, 1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_last_block_runs_only_for_tokens_that_the_head_reads(variant: Variant) -> None:
    model = make(variant)
    chain = chain_of(model, groups_of(model), pictures(variant, 2))
    assert chain.read == READ.get(variant.architecture)


def test_a_deep_network_starts_where_the_unit_is() -> None:
    model, images = make(VARIANTS[0]), pictures(VARIANTS[0], 2)
    starts = chain_of(model, groups_of(model), images).starts
    assert {name: starts[name] for name in ("embed", "blocks.0.mlp", "blocks.1.attn")} == {
        "embed": 1,
        "blocks.0.mlp": 1,
        "blocks.1.attn": 2,
    }


def test_halves_are_scores_of_every_second_image() -> None:
    model, images = make(VARIANTS[7]), pictures(VARIANTS[7], 6)
    units = some_units(model, 2)
    found = exact_kl(model, groups_of(model), torch.split(images, 3), None, units, rows=3, quiet=True)
    for half in (0, 1):
        wanted = published_kl(model, images[half::2], units, batch_size=3)
        for name, chosen in units.items():
            torch.testing.assert_close(found[name][half][chosen] / 3, wanted[name], rtol=1e-3, atol=NOISE)
