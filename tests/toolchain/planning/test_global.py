"""The global planner: budgets, floors, depth, and costs that are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from tests.contracts.variants import VARIANTS, make
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.depth import DepthPath
from upvits.toolchain.planning import Component, Curve, NotReachableError, count_costs, plan_within
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import widths_of

DEIT, PVT, LINEAR = VARIANTS[0], VARIANTS[8], VARIANTS[9]
ALL: tuple[Component, ...] = ("embed", "qk_v", "ffn")


def nats(model: nn.Module, seed: int = 0) -> Scores:
    """Scores as if they had been measured."""
    return replace(toolchain.score(model, method="random", seed=seed), method="fisher", unit="nats")


def with_depth(scores: Scores, loss: tuple[float, ...] = (0.1,)) -> Scores:
    return replace(scores, depth={"blocks": DepthPath((((0, 1),),), loss)})


@pytest.mark.parametrize("variant", [DEIT, PVT, LINEAR], ids=str)
@pytest.mark.parametrize("unit", ["MACs", "parameters"])
def test_costs_add_up_to_what_is_counted(variant: object, unit: str) -> None:
    model = make(variant)  # type: ignore[arg-type]
    costs = count_costs(model, unit)  # type: ignore[arg-type]
    plan = toolchain.plan(model, nats(model), ratio=0.5, align=4, components=("embed", "qk_v", "ffn"))
    widths = {g.name: len(plan.keep[g.name]) for g in groups_of(model) if g.name in plan.keep}
    stream = {g.stage: g.name for g in groups_of(model) if g.kind == "embed"}
    total = costs.fixed({name: widths[name] for name in stream.values()})
    for group in groups_of(model):
        if group.kind == "ffn":
            total += costs.branch(group.name, widths[stream[group.stage]], (widths[group.name], 0))
        if group.kind == "qk":
            both = (widths[group.name], widths[f"{group.module}.v"])
            total += costs.branch(group.module, widths[stream[group.stage]], both)
    assert total == (plan.after.macs if unit == "MACs" else plan.after.params)


@pytest.mark.parametrize("variant", [DEIT, PVT], ids=str)
@pytest.mark.parametrize("components", [ALL, ("embed", "attention", "ffn"), ("heads", "ffn")], ids="+".join)
def test_the_budget_holds_and_is_used(variant: object, components: tuple[Component, ...]) -> None:
    model = make(variant)  # type: ignore[arg-type]
    plan = toolchain.plan(model, nats(model), target_macs=0.8, planner="global", align=2, components=components)
    assert 0.77 * plan.before.macs < plan.after.macs <= 0.8 * plan.before.macs
    assert plan.planner == "global"
    pruned = toolchain.delete_units(model, plan)
    assert toolchain.count_macs(pruned, toolchain.preprocess_of(model).input_size) == plan.after.macs


def test_ratio_means_the_macs_of_the_uniform_plan() -> None:
    model = make(DEIT)
    uniform = toolchain.plan(model, nats(model), ratio=0.3, align=2)
    chosen = toolchain.plan(model, nats(model), ratio=0.3, align=2, planner="global")
    assert 0.97 * uniform.after.macs < chosen.after.macs <= uniform.after.macs


def test_everything_is_kept_where_the_budget_allows_it() -> None:
    model = make(DEIT)
    plan = toolchain.plan(model, nats(model), target_macs=1.0, planner="global", align=1)
    assert plan.after == plan.before


class Steps:
    """Costs by which a small search can be tried in full: widths of FFN units, nothing else."""

    unit = "units"

    def fixed(self, dims: Mapping[str, int]) -> float:
        return 0.0

    def branch(self, group: str, dim: int, width: tuple[int, int]) -> float:
        return float(width[0]) if group.endswith("mlp") else 0.0


def test_no_other_widths_lose_less_within_the_budget() -> None:
    model, losses = make(DEIT), {}
    generator = torch.Generator().manual_seed(0)
    for name in ("blocks.0.mlp", "blocks.1.mlp"):
        loss = torch.cat([torch.zeros(1), torch.rand(192, generator=generator).cumsum(0)]).double()
        losses[name] = Curve(torch.randperm(192, generator=generator), loss)
    scores = nats(model)
    plan = plan_within(model, scores, Steps(), 250, components=("ffn",), align=8, floor=0.25, curves=losses)
    kept = {name: len(plan.keep[name]) for name in losses}
    sizes = range(48, 193, 8)
    best = min(
        sum(float(losses[name].loss[192 - size]) for name, size in zip(losses, pair, strict=True))
        for pair in product(sizes, sizes)
        if sum(pair) <= 250
    )
    assert sum(float(losses[name].loss[192 - size]) for name, size in kept.items()) == best
    for name, units in plan.keep.items():  # curves may speak of another basis: which units stay is up to the scores
        assert set(units) == set(scores.values[name].topk(kept[name]).indices.tolist())


def test_floors_keep_layers_from_collapsing() -> None:
    model = make(DEIT)
    scores = nats(model)
    values = {name: value * (1e-9 if name == "blocks.1.mlp" else 1) for name, value in scores.values.items()}
    worthless = replace(scores, values=values)
    least = toolchain.plan(
        model, worthless, target_macs=0.7, planner="global", align=4, floor=0.25, components=("ffn",)
    )
    assert len(least.keep["blocks.1.mlp"]) == math.ceil(192 * 0.25)
    lower = toolchain.plan(model, worthless, target_macs=0.7, planner="global", align=4, components=("ffn",))
    assert len(lower.keep["blocks.1.mlp"]) == 20


def test_a_target_below_the_floors_says_what_holds_it() -> None:
    model = make(DEIT)
    with pytest.raises(NotReachableError, match="cannot be reached") as caught:
        toolchain.plan(model, nats(model), target_macs=0.3, planner="global", components=("ffn",))
    assert "most is held by the embeddings and the head" in caught.value.why
    lowest = math.ceil(caught.value.lowest) / toolchain.count_macs(model, (3, 32, 32))
    toolchain.plan(model, nats(model), target_macs=lowest + 1e-6, planner="global", components=("ffn",))


def test_scores_without_unit_are_refused() -> None:
    model = make(DEIT)
    with pytest.raises(UserError, match="cannot weigh"):
        toolchain.plan(model, toolchain.score(model, method="random"), target_macs=0.7, planner="global")


@pytest.mark.parametrize(("loss", "left"), [(1e-6, 1), (1e6, 2)])
def test_blocks_leave_where_that_is_the_better_use_of_the_budget(loss: float, left: int) -> None:
    model = make(DEIT)
    components: tuple[Component, ...] = ("ffn", "depth")
    scores = with_depth(nats(model), (loss,))
    plan = toolchain.plan(model, scores, target_macs=0.7, planner="global", align=2, components=components)
    assert len(plan.blocks.get("blocks", ((0, 0), (1, 1)))) == left
    assert plan.after.macs <= 0.7 * plan.before.macs
    pruned = toolchain.delete_units(model, plan)
    assert len(pruned.get_submodule("blocks")) == left  # type: ignore[arg-type]
    assert toolchain.count_params(pruned) == plan.after.params


def test_depth_needs_scores_with_depth_and_the_global_planner() -> None:
    model = make(DEIT)
    with pytest.raises(UserError, match="do not say which blocks"):
        toolchain.plan(model, nats(model), target_macs=0.7, planner="global", components=("ffn", "depth"))
    with pytest.raises(UserError, match="Only the global planner"):
        toolchain.plan(model, with_depth(nats(model)), ratio=0.5, components=("ffn", "depth"))


def test_dims_leave_where_they_are_worth_least() -> None:
    """v dims that cost nothing go first; the plan then names q·k and v apart."""
    model = make(PVT)
    scores = nats(model)
    values = {name: value * (1e-9 if name.endswith(".v") else 1) for name, value in scores.values.items()}
    plan = toolchain.plan(
        model, replace(scores, values=values), target_macs=0.97, planner="global", align=4, components=("qk_v",)
    )
    assert all(change.after == change.before for change in plan.changes if change.group.endswith(".qk"))
    cut = [change for change in plan.changes if change.group.endswith(".v")]
    assert cut
    assert all(change.after < change.before and change.heads[0] == change.heads[1] for change in cut)
    pruned = toolchain.delete_units(model, plan)
    assert widths_of(groups_of(pruned)) == plan.widths
