"""Several cuts as one plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.contracts.variants import VARIANTS, make, pictures
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.depth import DepthPath
from upvits.toolchain.planning import Component, Planner
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import Widths, widths_of
from upvits.toolchain.surgery.rounds import joined, plan_in_rounds

DEIT = VARIANTS[0]


class Scorer:
    """Random scores that remember for which networks they were asked."""

    def __init__(self, depth: dict[str, DepthPath] | None = None) -> None:
        self.networks: list[nn.Module] = []
        self.depth = depth or {}

    def __call__(self, network: nn.Module, cuts: Widths | None) -> Scores:
        self.networks.append(network)
        scores = toolchain.score(network, method="random", seed=len(self.networks))
        return replace(scores, unit="nats", depth=self.depth if len(self.networks) == 1 else {})


@pytest.mark.parametrize(
    ("planner", "components"),
    [
        ("uniform", ("embed", "attention", "ffn")),
        ("uniform", ("embed", "qk_v", "ffn")),
        ("uniform", ("heads", "ffn")),
        ("global", ("embed", "qk_v", "ffn")),
        ("global", ("embed", "attention", "ffn")),
    ],
)
def test_rounds_end_where_one_cut_would_and_rescore_what_is_left(
    planner: Planner, components: tuple[Component, ...]
) -> None:
    model, scorer = make(DEIT), Scorer()
    plan = plan_in_rounds(model, scorer, 3, ratio=0.5, planner=planner, align=2, components=components)
    sizes = [toolchain.count_macs(network, (3, 32, 32)) for network in scorer.networks]
    once = toolchain.plan(model, Scorer()(model, None), ratio=0.5, planner=planner, align=2, components=components)
    assert len(sizes) == 3
    assert sizes[0] > sizes[1] > sizes[2] > plan.after.macs
    if planner == "uniform":
        assert plan.widths == once.widths
        assert plan.keep != once.keep
    else:
        assert 0.9 * once.after.macs < plan.after.macs <= float(once.asked["budget"])
    pruned = toolchain.delete_units(model, plan)
    assert toolchain.count_macs(pruned, (3, 32, 32)) == plan.after.macs
    assert widths_of(groups_of(pruned)) == plan.widths
    assert plan.asked["rounds"] == 3


def test_two_plans_in_one_do_the_same_as_one_after_the_other() -> None:
    """With a shorter network first, and q·k and v dims that come apart in the second."""
    model, images = make(replace(DEIT, args={**DEIT.args, "depth": 3})), pictures(DEIT)
    path = {"blocks": DepthPath((((0, 0), (1, 2)),), (0.1,))}
    first = toolchain.plan(model, Scorer(path)(model, None), ratio=0.2, depth_ratio=0.34, align=2)
    between = toolchain.delete_units(model, first)
    scores = replace(Scorer({"blocks": DepthPath((((0, 1),),), (0.1,))})(between, None), seed=5)
    second = toolchain.plan(between, scores, ratio=0.2, depth_ratio=0.5, align=2, components=("qk_v", "ffn"))
    wanted = toolchain.delete_units(between, second)
    together = toolchain.delete_units(model, joined(first, second.keep, second.num_heads, second.blocks))
    assert joined(first, second.keep, second.num_heads, second.blocks).blocks == {"blocks": ((0, 2),)}
    assert len(together.get_submodule("blocks")) == 1  # type: ignore[arg-type]
    with torch.inference_mode():
        torch.testing.assert_close(together(images), wanted(images), atol=1e-6, rtol=1e-5)


def test_blocks_leave_in_the_first_round() -> None:
    model, scorer = make(DEIT), Scorer({"blocks": DepthPath((((1, 1),),), (0.1,))})
    plan = plan_in_rounds(model, scorer, 2, ratio=0.3, depth_ratio=0.5, align=2)
    assert [len(network.get_submodule("blocks")) for network in scorer.networks] == [2, 1]  # type: ignore[arg-type]
    assert plan.blocks == {"blocks": ((1, 1),)}
    assert len(toolchain.delete_units(model, plan).get_submodule("blocks")) == 1  # type: ignore[arg-type]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(UserError, match="out of range"):
        plan_in_rounds(make(DEIT), Scorer(), 0, ratio=0.5)
