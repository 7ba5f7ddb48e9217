"""What a report says of a plan."""

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.contracts.variants import VARIANTS, make
from upvits import toolchain
from upvits.deploy.stages.steadiness import unsteady
from upvits.deploy.stages.summary import _reproduce
from upvits.toolchain.families import groups_of
from upvits.toolchain.planning import Component
from upvits.toolchain.scores import Scores


def shaky(depth: bool) -> tuple[torch.nn.Module, Scores]:
    """A small DeiT with scores whose halves never agree."""
    model = make(VARIANTS[0])
    scores = toolchain.score(model, torch.randn(4, 3, 32, 32), depth=depth)
    rising = {group.name: torch.arange(float(group.size)) for group in groups_of(model)}
    return model, replace(scores, halves={name: torch.stack([own, -own]) for name, own in rising.items()})


def unstable(components: tuple[Component, ...], rotated: tuple[str, ...] = ()) -> set[str]:
    model, scores = shaky(depth=False)
    plan = toolchain.plan(model, scores, ratio=0.5, align=1, components=components)
    return {*unsteady(plan, scores, model, rotated)}


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
    assert {*unsteady(plan, scores, model, ())} == {f"blocks.{pair[1]}.mlp"}


def test_ffn_units_that_the_refit_chose_are_not_told() -> None:
    model, scores = shaky(depth=False)
    plan = toolchain.plan(model, scores, ratio=0.5, align=1, components=("attention", "ffn"))
    plan = replace(plan, asked={**plan.asked, "ffn_units": "joint loss"})
    assert {*unsteady(plan, scores, model, ())} == {"blocks.0.attn", "blocks.1.attn"}


def test_halves_are_judged_by_what_the_plan_keeps() -> None:
    model, scores = shaky(depth=False)
    size = next(group.size for group in groups_of(model) if group.kind == "ffn")
    best = torch.zeros(2, size)
    best[:, : size // 4] = 2.0  # the same quarter in both halves; the rest is chance
    best += torch.rand(2, size)
    scores = replace(scores, halves={**scores.halves, "blocks.0.mlp": best})
    quarter = toolchain.plan(model, scores, ratio=0.75, align=1, components=("ffn",))
    half = toolchain.plan(model, scores, ratio=0.4, align=1, components=("ffn",))
    assert "blocks.0.mlp" not in unsteady(quarter, scores, model, ())
    found = unsteady(half, scores, model, ())
    assert found["blocks.0.mlp"].kept == len(half.keep["blocks.0.mlp"])
    assert found["blocks.0.mlp"].overlap < 0.8


@pytest.mark.parametrize("name", ["shop", "my run", "$(touch MARKER)", 'a"; touch MARKER; "', "it's", "-o"])
def test_commands_that_give_the_result_again_are_quoted_for_the_shell(name: str) -> None:
    job: Any = SimpleNamespace(folder=Path("runs") / name)
    folder = f"./{name}" if name.startswith("-") else name
    command = ["upvits-deploy", "build", "--recipe", f"{folder}/recipe.toml", "--output", f"{folder}-again"]
    assert shlex.split(_reproduce(job)[1]) == command
