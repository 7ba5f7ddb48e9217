"""Targets are used up: within one percent of the budget, or a warning that says which steps are too large."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import timm
from torch import nn

from tests.contracts.variants import VARIANTS, make
from upvits import toolchain
from upvits.toolchain.families import groups_of
from upvits.toolchain.planning import Component, CountedCosts, count_costs
from upvits.toolchain.planning.budget import TOLERANCE, cost_of, widths_within
from upvits.toolchain.planning.document import Size, sizer
from upvits.toolchain.planning.uniform import ratios_of, uniform_widths, widths_at
from upvits.toolchain.structure.groups import ChannelGroup, widths_of
from upvits.toolchain.surgery.rounds import plan_in_rounds

COMPONENTS: tuple[Component, ...] = ("embed", "attention", "ffn")
NETWORKS = ("pvt_v2_b0", "deit_tiny_patch16_224", "vit_small_patch16_224", "deit_base_patch16_224")
TARGETS = (0.8, 0.65, 0.5, 0.35, 0.2)
TOO_COARSE = {("deit_tiny_patch16_224", "MACs", 16, 0.8)}
"""Where no network with equal widths and this alignment is within one percent of the budget."""

CASES = [
    *[(name, unit, 8) for name in NETWORKS for unit in ("MACs", "parameters")],
    ("deit_tiny_patch16_224", "MACs", 1),
    ("deit_tiny_patch16_224", "MACs", 16),
    ("pvt_v2_b0", "parameters", 16),
]


@cache
def network(name: str) -> tuple[nn.Module, tuple[ChannelGroup, ...], dict[str, CountedCosts]]:
    model = timm.create_model(name)
    return model, tuple(groups_of(model)), {unit: count_costs(model, unit) for unit in ("MACs", "parameters")}


def total(size: Size, unit: str) -> int:
    return size.macs if unit == "MACs" else size.params


@pytest.mark.parametrize(("name", "unit", "align"), CASES)
def test_every_budget_of_a_grid_is_used(name: str, unit: str, align: int) -> None:
    model, groups, costs = network(name)
    size = sizer(model, None)
    before = total(size(widths_of(groups)), unit)
    short = set()
    for target in TARGETS:
        widths = widths_within(groups, costs[unit], target * before, align, COMPONENTS, "a budget")
        used = total(size(widths), unit) / (target * before)
        assert used <= 1
        if used < 1 - TOLERANCE:
            short.add((name, unit, align, target))
    assert short == {case for case in TOO_COARSE if case[:3] == (name, unit, align)}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_counted_costs_are_those_of_the_network(variant: object) -> None:
    model = make(variant)  # type: ignore[arg-type]
    groups = groups_of(model)
    widths = uniform_widths(groups, 0.4, 2, COMPONENTS)
    after = sizer(model, None)(widths)
    assert cost_of(groups, count_costs(model), widths) == after.macs
    assert cost_of(groups, count_costs(model, "parameters"), widths) == after.params


def test_shares_of_widths_give_the_widths_again() -> None:
    groups = groups_of(make(VARIANTS[0]))
    choices: tuple[tuple[Component, ...], ...] = (COMPONENTS, ("heads", "ffn"), ("qk_v",), ("embed",))
    for components in choices:
        widths = uniform_widths(groups, 0.5, 2, components)
        assert widths_at(groups, ratios_of(groups, widths, components), 2, components) == widths


def test_a_budget_that_stays_unused_is_said_with_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    model = make(VARIANTS[0])
    scores = toolchain.score(model, method="random")
    with caplog.at_level(logging.WARNING):
        plan = toolchain.plan(model, scores, target_macs=0.75, align=8, components=("embed", "attention"))
    assert plan.after.macs < 0.99 * 0.75 * plan.before.macs
    assert "of the budget stays unused" in caplog.text
    assert "blocks.0.attn by 24" in caplog.text


def test_advice_to_align_less_uses_the_budget() -> None:
    model = make(VARIANTS[0])
    scores = toolchain.score(model, method="random")
    coarse, fine = (
        toolchain.plan(model, scores, target_macs=0.75, align=align, components=("embed", "attention"))
        for align in (8, 1)
    )
    assert coarse.after.macs < fine.after.macs <= 0.75 * fine.before.macs


def test_rounds_end_at_the_widths_of_the_target() -> None:
    model = make(VARIANTS[0])
    scores = toolchain.score(model, method="random")

    def again(network: nn.Module, _: object) -> toolchain.Scores:
        return scores if network is model else toolchain.score(network, method="random")

    whole = toolchain.plan(model, scores, target_macs=0.6, align=2)
    stepwise = plan_in_rounds(model, again, 3, target_macs=0.6, align=2)
    assert stepwise.widths == whole.widths
    assert stepwise.after == whole.after
