"""Plans: ratios, targets, published shapes, and requests that cannot be met."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.contracts.variants import VARIANTS, make, pictures
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.depth import DepthPath
from upvits.toolchain.planning import Component, PruningPlan, aligned
from upvits.toolchain.scores import Scores

DEIT, PVT = VARIANTS[0], VARIANTS[7]


def random_plan(model: nn.Module, **request: object) -> PruningPlan:
    return toolchain.plan(model, toolchain.score(model, method="random"), **request)  # type: ignore[arg-type]


@given(st.integers(1, 512), st.floats(0, 0.999), st.integers(1, 64))
def test_aligned_is_a_multiple_near_the_share_or_an_error(size: int, ratio: float, align: int) -> None:
    try:
        width = aligned(size, ratio, align, "group")
    except UserError:
        assert size * (1 - ratio) < align / 2
        return
    assert width == size or width % align == 0
    assert 0 < width <= size
    assert abs(width - size * (1 - ratio)) <= align / 2 + 1e-9 or width == size


def test_ratio_zero_keeps_everything() -> None:
    plan = random_plan(make(PVT), ratio=0.0)
    assert plan.after == plan.before
    assert plan.widths == plan.dense_widths


def test_the_best_units_are_kept() -> None:
    model = make(DEIT)
    scores = toolchain.score(model, method="random")
    plan = toolchain.plan(model, scores, ratio=0.5, align=1)
    for name in ("embed", "blocks.1.mlp"):
        kept = torch.tensor(plan.keep[name])
        others = torch.ones(len(scores.values[name]), dtype=torch.bool)
        others[kept] = False
        assert scores.values[name][kept].min() > scores.values[name][others].max()
        assert kept.tolist() == sorted(kept.tolist())


def test_every_head_keeps_its_best_dims() -> None:
    model = make(DEIT)
    scores = toolchain.score(model, method="random")
    plan = toolchain.plan(model, scores, ratio=0.5, align=1)
    values = scores.values["blocks.0.attn"].view(3, 16)
    wanted = [head * 16 + dim for head in range(3) for dim in sorted(values[head].topk(8).indices.tolist())]
    assert list(plan.keep["blocks.0.attn"]) == wanted
    assert plan.num_heads["blocks.0.attn"] == 3


def test_whole_heads_leave_by_their_own_scores() -> None:
    model = make(DEIT)
    scores = toolchain.score(model, method="random")
    plan = toolchain.plan(model, scores, ratio=0.34, align=1, components=("heads",))
    worst = int(scores.values["blocks.0.attn.heads"].argmin())
    assert plan.num_heads["blocks.0.attn"] == 2
    assert set(range(48)) - set(plan.keep["blocks.0.attn"]) == set(range(worst * 16, worst * 16 + 16))


@settings(max_examples=8)
@given(st.floats(0.25, 1.0))
def test_macs_target_is_kept_and_nearly_used(share: float) -> None:
    plan = random_plan(make(DEIT), target_macs=share, align=2)
    assert 0.97 * share * plan.before.macs <= plan.after.macs <= share * plan.before.macs


def test_params_target() -> None:
    plan = random_plan(make(PVT), target_params=0.5, align=4)
    assert 0.48 < plan.after.params / plan.before.params <= 0.5


def test_unreachable_target_says_what_stops_it() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        random_plan(make(DEIT), target_macs=0.001)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(UserError, match="out of range"):
        random_plan(make(DEIT), ratio=ratio)


def test_a_width_of_zero_is_refused_with_the_largest_ratio() -> None:
    model = make(DEIT)
    with pytest.raises(UserError, match="without any channels") as caught:
        random_plan(model, ratio=0.9, align=8)
    assert "0.75" in caught.value.fix
    random_plan(model, ratio=0.75, align=8)


@pytest.mark.parametrize(
    "request_",
    [{}, {"ratio": 0.5, "target_macs": 0.5}, {"ratio": 0.5, "align": 0}, {"ratio": 0.5, "components": ()},
     {"ratio": 0.5, "components": ("attention", "heads")}, {"ratio": 0.5, "components": ("norms",)},
     {"ratio": 0.5, "components": ("attention", "qk_v")}, {"ratio": 0.5, "planner": "best"}],
)  # fmt: skip
def test_contradictory_requests(request_: dict[str, object]) -> None:
    with pytest.raises(UserError):
        random_plan(make(DEIT), **request_)


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="another network"):
        toolchain.plan(make(DEIT, seed=1), toolchain.score(make(DEIT, seed=0), method="random"), ratio=0.5)


def test_nan_scores_are_refused() -> None:
    model, images = make(DEIT), pictures(DEIT)
    sampled = toolchain.score(model, images, method="kl", units={"embed": [0]})
    with pytest.raises(UserError, match="NaN"):
        toolchain.plan(model, sampled, ratio=0.5)


def test_plan_documents_survive_the_disk(tmp_path: Path) -> None:
    plan = random_plan(make(PVT), ratio=0.5, align=4)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="keep: Field required"):
        PruningPlan.load(tmp_path / "plan.json")


def small_deit(name: str, embed_dim: int, num_heads: int, depth: int = 2) -> nn.Module:
    model: nn.Module = timm.create_model(
        name, img_size=32, depth=depth, num_classes=5, embed_dim=embed_dim, num_heads=num_heads
    )
    return model.eval()


def test_like_gives_exactly_the_smaller_model_with_merged_heads() -> None:
    torch.manual_seed(0)
    base, tiny = small_deit("deit_base_patch16_224", 96, 6), small_deit("deit_tiny_patch16_224", 48, 3)
    scores = toolchain.score(base, method="random")
    plan = toolchain.plan(base, scores, like=tiny, input_size=(3, 32, 32))
    pruned: Any = toolchain.delete_units(base, plan)
    wanted = {name: tensor.shape for name, tensor in tiny.state_dict().items()}
    assert {name: tensor.shape for name, tensor in pruned.state_dict().items()} == wanted
    tiny.load_state_dict(pruned.state_dict())
    images = pictures(DEIT)
    with torch.inference_mode():
        assert torch.equal(tiny(images), pruned(images))
    # heads 0 and 1 are merged: their 32 dims compete for the 16 of the new head
    best = sorted(scores.values["blocks.0.attn"][:32].topk(16).indices.tolist())
    assert list(plan.keep["blocks.0.attn"][:16]) == best
    assert pruned.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"


def test_like_pvt_b0_from_b1() -> None:
    b1 = timm.create_model("pvt_v2_b1", num_classes=5)
    b0 = timm.create_model("pvt_v2_b0", num_classes=5)
    pruned: Any = toolchain.delete_units(b1, random_plan(b1, like=b0))
    assert type(b0.stages[0].blocks[0].attn) is type(pruned.stages[0].blocks[0].attn)
    b0.load_state_dict(pruned.state_dict())


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (lambda: small_deit("deit_tiny_patch16_224", 48, 3, depth=1), "another depth"),
        (lambda: small_deit("deit_tiny_patch16_224", 60, 5), "does not fit"),
        (lambda: small_deit("deit_base_patch16_224", 192, 6), "does not fit"),
        (lambda: timm.create_model("pvt_v2_b0", num_classes=5), "another family"),
    ],
)
def test_like_refuses_what_cannot_be_reached(like: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        random_plan(small_deit("deit_base_patch16_224", 96, 6), like=like(), input_size=(3, 32, 32))  # type: ignore[operator]


def with_depth(model: nn.Module, **paths: DepthPath) -> Scores:
    """Random scores that say how the lists of blocks get shorter; `stages_1` stands for `stages.1.blocks`."""
    named = {f"{name.replace('_', '.')}.blocks" if "_" in name else name: path for name, path in paths.items()}
    return replace(toolchain.score(model, method="random"), depth=named)


def whole_path(count: int) -> DepthPath:
    """The last block leaves first, and so on."""
    steps = tuple(tuple((i, i) for i in range(left)) for left in range(count - 1, 0, -1))
    return DepthPath(steps, tuple(0.1 * (step + 1) for step in range(count - 1)))


@pytest.mark.parametrize("attention", ["attention", "qk_v"])
def test_like_takes_the_depth_too(attention: Component) -> None:
    b2 = timm.create_model("pvt_v2_b2", num_classes=5)
    b1 = timm.create_model("pvt_v2_b1", num_classes=5)
    scores = with_depth(b2, **{f"stages_{index}": whole_path(count) for index, count in enumerate((3, 4, 6, 3))})
    plan = toolchain.plan(b2, scores, like=b1, components=("embed", attention, "ffn"))
    assert {name: len(pairs) for name, pairs in plan.blocks.items()} == {f"stages.{i}.blocks": 2 for i in range(4)}
    pruned: Any = toolchain.delete_units(b2, plan)
    b1.load_state_dict(pruned.state_dict())
    assert pruned.pretrained_cfg["architecture"] == "pvt_v2_b1"
    assert type(pruned.stages[0].blocks[0].attn) is type(b1.stages[0].blocks[0].attn)
    assert plan.after.params == toolchain.count_params(b1)


def test_depth_ratio_takes_the_cheapest_steps_of_all_lists() -> None:
    model: Any = make(replace(PVT, args={**PVT.args, "depths": (1, 3, 3, 1)}))
    dear = DepthPath((((0, 0), (1, 1)), ((0, 0),)), (0.5, 0.9))
    cheap = DepthPath((((0, 1), (2, 2)), ((0, 2),)), (0.1, 0.7))
    scores = with_depth(model, stages_1=dear, stages_2=cheap)
    two = toolchain.plan(model, scores, depth_ratio=0.25)  # 0.1, then 0.5 rather than another 0.6
    assert two.blocks == {"stages.1.blocks": dear.steps[0], "stages.2.blocks": cheap.steps[0]}
    assert toolchain.plan(model, scores, depth_ratio=0.125).blocks == {"stages.2.blocks": cheap.steps[0]}
    kept: Any = toolchain.delete_units(model, two)
    assert toolchain.count_params(kept) == two.after.params < two.before.params
    assert kept.stages[2].blocks[0].mlp.fc1.weight.equal(model.stages[2].blocks[1].mlp.fc1.weight)
    assert kept.stages[2].blocks[0].attn.q.weight.equal(model.stages[2].blocks[0].attn.q.weight)
    small = toolchain.plan(model, scores, depth_ratio=0.25, target_macs=0.5, align=4)
    assert small.after.macs <= 0.5 * small.before.macs
    with pytest.raises(UserError, match="at most 4 can leave"):
        toolchain.plan(model, scores, depth_ratio=0.7)


def test_depth_is_refused_where_it_was_not_measured() -> None:
    model = make(DEIT)
    with pytest.raises(UserError, match="do not say which blocks"):
        random_plan(model, depth_ratio=0.5)
    with pytest.raises(UserError, match="fixes depth"):
        random_plan(model, depth_ratio=0.5, like=model)


def test_q_and_v_choose_their_own_dims() -> None:
    model = make(DEIT)
    scores = toolchain.score(model, method="random")
    plan = toolchain.plan(model, scores, ratio=0.5, align=1, components=("embed", "qk_v", "ffn"))
    for part in ("qk", "v"):
        best = scores.values[f"blocks.0.attn.{part}"].view(3, 16).topk(8).indices
        wanted = sorted((best + torch.arange(3).view(-1, 1) * 16).flatten().tolist())
        assert list(plan.keep[f"blocks.0.attn.{part}"]) == wanted
    assert plan.keep["blocks.0.attn.qk"] != plan.keep["blocks.0.attn.v"]
    name = "blocks.0.attn"
    assert type(toolchain.delete_units(model, plan).get_submodule(name)) is type(model.get_submodule(name))
    assert plan.widths.channels["blocks.0.attn"] == 24


def test_plans_of_earlier_versions_are_read_and_later_ones_refused(tmp_path: Path) -> None:
    plan = random_plan(make(DEIT), ratio=0.5)
    document = json.loads(plan.to_json())
    del document["blocks"], document["planner"]
    (tmp_path / "plan.json").write_text(json.dumps({**document, "format": 1}))
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").write_text(json.dumps({**document, "format": 3}))
    with pytest.raises(UserError, match="format is 3"):
        PruningPlan.load(tmp_path / "plan.json")


def test_uniform_plans_are_equal_within_a_stage() -> None:
    model = make(VARIANTS[8])
    widths = random_plan(model, ratio=0.4, align=4).widths
    for kind in ("attention", "ffn"):
        for stage in range(4):
            found = {widths.channels[g.name] for g in groups_of(model) if g.kind == kind and g.stage == stage}
            assert len(found) == 1


def test_scores_class_is_what_plan_takes() -> None:
    model = make(DEIT)
    values = {group.name: torch.arange(group.size, dtype=torch.float64) for group in groups_of(model)}
    scores = Scores("random", "none", values, 0, 0, toolchain.score(model, method="random").model_digest)
    assert toolchain.plan(model, scores, ratio=0.5).keep["embed"] == tuple(range(24, 48))
