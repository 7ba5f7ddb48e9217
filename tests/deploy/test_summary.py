"""What a report says of a plan."""

from dataclasses import replace

import pytest
import torch

import toolchain
from deploy.summary import _plan_figures
from tests.contracts.variants import VARIANTS, make
from toolchain.families import groups_of
from toolchain.planning import Component
from toolchain.scores import Scores
from toolchain.scores.stability import Stability


def shaky(depth: bool) -> tuple[torch.nn.Module, Scores]:
    """A small DeiT with scores whose halves never agree."""
    model = make(VARIANTS[0])
    scores = toolchain.score(model, torch.randn(4, 3, 32, 32), depth=depth)
    stability = {group.name: Stability(0.1, 0.1, 4) for group in groups_of(model)}
    return model, replace(scores, stability=stability)


def unstable(components: tuple[Component, ...], rotated: tuple[str, ...] = ()) -> set[str]:
    model, scores = shaky(depth=False)
    plan = toolchain.plan(model, scores, ratio=0.5, align=1, components=components)
    return {one.group for one in _plan_figures(plan, scores, rotated).unstable}


@pytest.mark.parametrize(
    ("components", "parts"),
    [(("attention",), {"attn"}), (("qk_v",), {"attn.qk", "attn.v"}), (("ffn",), {"mlp"})],
)
def test_groups_that_were_cut_are_told(components: tuple[Component, ...], parts: set[str]) -> None:
    assert unstable(components) == {f"blocks.{index}.{part}" for index in (0, 1) for part in parts}


def test_whole_heads_go_by_their_own_scores() -> None:
    assert {"blocks.0.attn.heads", "blocks.1.attn.heads"} <= unstable(("heads",))


def test_where_a_basis_was_rotated_scores_decided_nothing() -> None:
    rotated = ("embed", "blocks.0.attn", "blocks.1.attn")
    assert unstable(("embed", "attention", "ffn"), rotated) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert unstable(("embed", "qk_v"), rotated) == set()


def test_groups_keep_the_dense_networks_names_when_blocks_leave() -> None:
    model, scores = shaky(depth=True)
    plan = toolchain.plan(model, scores, ratio=0.5, depth_ratio=0.5, align=1, components=("ffn",))
    (pair,) = plan.blocks["blocks"]
    assert {one.group for one in _plan_figures(plan, scores, ()).unstable} == {f"blocks.{pair[1]}.mlp"}
