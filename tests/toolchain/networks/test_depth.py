"""Fewer blocks: names, lists of blocks, and networks that are as deep as their plan says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.variants import VARIANTS, make, pictures
from upvits.toolchain.networks.depth import after_shortening, all_blocks, name_after, name_before, shorten, shorter

BLOCKS = {"blocks": ((0, 1), (2, 2))}  # FFN 0 and attention 1 left as a shifted block


@pytest.mark.parametrize(
    ("dense", "short"),
    [
        ("embed", "embed"),
        ("blocks.0.attn.qk", "blocks.0.attn.qk"),
        ("blocks.0.mlp", None),
        ("blocks.1.attn", None),
        ("blocks.1.mlp", "blocks.0.mlp"),
        ("blocks.2.attn.heads", "blocks.1.attn.heads"),
        ("blocks.3.mlp", None),
    ],
)
def test_names_follow_their_branches(dense: str, short: str | None) -> None:
    assert name_after(dense, BLOCKS) == short
    if short is not None:
        assert name_before(short, BLOCKS) == dense


def test_lists_of_other_stages_are_left_alone() -> None:
    values = {"stages.0.blocks.0.mlp": 1, "stages.0.blocks.1.mlp": 2, "stages.1.blocks.0.mlp": 3}
    found = after_shortening(values, {"stages.0.blocks": ((1, 1),)})
    assert found == {"stages.0.blocks.0.mlp": 2, "stages.1.blocks.0.mlp": 3}


@given(st.integers(1, 6), st.data())
def test_branches_stay_in_order(count: int, data: st.DataObject) -> None:
    pairs = tuple((index, index) for index in range(count))
    while len(pairs) > 1 and data.draw(st.booleans()):
        pairs = data.draw(st.sampled_from(shorter(pairs)))
        assert all(attention <= ffn for attention, ffn in pairs)
        assert all(ffn < attention for (_, ffn), (attention, _) in pairwise(pairs))


def test_a_shifted_block_is_the_sum_of_its_branches() -> None:
    """Leaving out an FFN and the attention after it is the network with both branches silenced."""
    variant = VARIANTS[2]  # LayerScale, which belongs to the branches
    model, images = make(variant), pictures(variant)
    silenced = make(variant)
    with torch.no_grad():
        silenced.get_parameter("blocks.0.ls2.gamma").zero_()
        silenced.get_parameter("blocks.1.ls1.gamma").zero_()
    short: Any = shorten(model, {"blocks": ((0, 1),)})
    with torch.inference_mode():
        assert torch.allclose(short(images), silenced(images), atol=1e-6)
        assert not torch.allclose(short(images), model(images), atol=1e-3)
    assert all_blocks(short) == {"blocks": ((0, 0),)}
    assert len(short.feature_info) == 1
    assert len(list(model.get_submodule("blocks").children())) == 2
