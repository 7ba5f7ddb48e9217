"""What every family promises, for every kind of model that it supports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import FAMILIES, family_of, groups_of, segments_of
from upvits.toolchain.networks.depth import DepthPath, shorten
from upvits.toolchain.planning import Component, PruningPlan
from upvits.toolchain.scores.masks import masked
from upvits.toolchain.structure.groups import axis_indices, partition, widths_of

CUTS: tuple[tuple[Component, ...], ...] = (
    ("embed", "attention", "ffn"),
    ("embed", "heads", "ffn"),
    ("attention",),
    ("heads",),
    ("ffn",),
    ("embed",),
    ("qk_v",),
)

variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def planned(model: nn.Module, ratio: float, components: tuple[Component, ...], seed: int = 0) -> PruningPlan:
    """A plan by random scores: which units go does not matter here, only that they go."""
    scores = toolchain.score(model, method="random", seed=seed)
    return toolchain.plan(model, scores, ratio=ratio, align=4, components=components)


def uneven(model: nn.Module) -> PruningPlan:
    """Half of everything, and half of the v dims that are left in all attentions but the last."""
    plan = planned(model, 0.5, ("embed", "qk_v", "ffn"))
    keep = dict(plan.keep)
    for name in [name for name in keep if name.endswith(".v")][:-1]:
        pools = torch.tensor(keep[name]).view(plan.num_heads[name.removesuffix(".v")], -1)
        keep[name] = tuple(pools[:, ::2].flatten().tolist())
    return replace(plan, keep=keep)


def masked_output(model: nn.Module, plan: PruningPlan, images: torch.Tensor) -> torch.Tensor:
    """The dense network's output with everything masked that the plan removes."""
    groups = groups_of(model)
    masks = {}
    for group in groups:
        if group.name in plan.keep:
            masks[group.name] = torch.zeros(len(images), group.size)
            masks[group.name][:, list(plan.keep[group.name])] = 1
    with torch.inference_mode(), masked(model, groups, masks):
        output: torch.Tensor = model(images)
    if model.num_classes == 0 and "embed" in plan.keep:
        return output[:, list(plan.keep["embed"])]
    return output


@torch.inference_mode()
def output_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(images)
    return result


def test_every_family_has_a_variant() -> None:
    assert {variant.family for variant in VARIANTS} == set(FAMILIES)


@variants
def test_family_is_found(variant: Variant) -> None:
    assert family_of(make(variant)) is FAMILIES[variant.family]


@variants
def test_groups_own_every_parameter_but_the_class_scores(variant: Variant) -> None:
    model = make(variant)
    owned = {piece.parameter for group in groups_of(model) for piece in group.slices}
    free = {name for name, _ in model.named_parameters()} - owned
    assert free <= {"head.bias", "head_dist.bias"}


@variants
def test_slices_have_the_length_that_they_claim(variant: Variant) -> None:
    model = make(variant)
    state = model.state_dict()
    for group in groups_of(model):
        for piece in group.slices:
            end = piece.start + piece.repeat * group.size * piece.unit
            length = state[piece.parameter].shape[piece.axis]
            assert end == length or (group.kind == "qk" and end < length), piece


@variants
def test_keeping_everything_is_bit_identical(variant: Variant) -> None:
    model, images = make(variant), pictures(variant)
    kept = toolchain.delete_units(model, planned(model, 0.0, ("embed", "attention", "ffn")))
    assert torch.equal(output_of(kept, images), output_of(model, images))


@variants
@pytest.mark.parametrize("components", CUTS, ids="+".join)
def test_pruned_equals_masked_dense(variant: Variant, components: tuple[Component, ...]) -> None:
    model, images = make(variant), pictures(variant)
    plan = planned(model, 0.5, components)
    pruned = toolchain.delete_units(model, plan)
    expected, actual = masked_output(model, plan, images), output_of(pruned, images)
    assert (expected - actual).abs().max() <= 1e-5
    assert not torch.allclose(actual, output_of(model, images)[:, : actual.shape[1]], atol=1e-3)


@variants
def test_the_query_scale_is_folded(variant: Variant) -> None:
    """Without sqrt(new / old) on the queries, the narrower heads attend more sharply than the masked ones."""
    model, images = make(variant), pictures(variant)
    plan = planned(model, 0.5, ("attention",))
    pruned = toolchain.delete_units(model, plan)
    attention = next(group for group in groups_of(model) if group.kind == "attention")
    weight = pruned.get_parameter(attention.queries[0])
    kept = list(plan.keep[attention.name])
    expected = model.get_parameter(attention.queries[0])[kept] * 0.5**0.5
    torch.testing.assert_close(weight[: len(kept)], expected)
    with torch.no_grad():
        for name in attention.queries:
            pruned.get_parameter(name)[: len(kept)] *= 2**0.5
    assert (masked_output(model, plan, images) - output_of(pruned, images)).abs().max() > 1e-5


@variants
@pytest.mark.parametrize("components", CUTS[:2] + CUTS[3:4], ids="+".join)
def test_saved_and_loaded(variant: Variant, components: tuple[Component, ...], tmp_path: Path) -> None:
    model, images = make(variant), pictures(variant)
    pruned = toolchain.delete_units(model, planned(model, 0.5, components))
    toolchain.save(pruned, tmp_path / "model")
    loaded = toolchain.load(tmp_path / "model")
    assert torch.equal(output_of(loaded, images), output_of(pruned, images))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


@variants
def test_unequal_dims_are_cut_saved_and_cut_again(variant: Variant, tmp_path: Path) -> None:
    model, images = make(variant), pictures(variant)
    plan = uneven(model)
    pruned = toolchain.delete_units(model, plan)
    expected, actual = masked_output(model, plan, images), output_of(pruned, images)
    assert (expected - actual).abs().max() <= 1e-5
    assert plan.widths == widths_of(groups_of(pruned))
    assert any(name.endswith(".qk") for name in plan.widths.channels)
    toolchain.save(pruned, tmp_path / "model")
    loaded = toolchain.load(tmp_path / "model")
    assert torch.equal(output_of(loaded, images), actual)
    with pytest.raises(UserError, match="Whole heads"):
        planned(loaded, 0.5, ("heads",))
    again = toolchain.plan(loaded, toolchain.score(loaded, method="random"), ratio=0.5, align=1)
    smaller = toolchain.delete_units(loaded, again)
    assert (masked_output(loaded, again, images) - output_of(smaller, images)).abs().max() <= 1e-5
    assert toolchain.count_params(smaller) == again.after.params < toolchain.count_params(loaded)


@variants
def test_groups_that_make_up_a_network_own_every_part_once(variant: Variant) -> None:
    model = make(variant)
    for network in (model, toolchain.delete_units(model, uneven(model))):
        state = network.state_dict()
        owned: dict[tuple[str, int], list[int]] = {}
        for group in partition(groups_of(network)):
            for piece in group.slices:
                axis = piece.axis % state[piece.parameter].ndim
                places = axis_indices(piece, group.size, torch.arange(group.size)).tolist()
                owned.setdefault((piece.parameter, axis), []).extend(places)
        for (name, axis), places in owned.items():
            assert sorted(places) == list(range(state[name].shape[axis])), name


@variants
@pytest.mark.parametrize("pairs", [((1, 1),), ((0, 1),)], ids=["whole", "shifted"])
def test_shorter_networks_load_with_stock_timm(
    variant: Variant, pairs: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    deep = {"depths": (1, 2, 1, 1)} if variant.family == "pvt_v2" else {}
    variant = replace(variant, args={**variant.args, **deep})
    model, images = make(variant), pictures(variant)
    name = next(name for name, count in family_of(model).block_lists(model).items() if count == 2)
    scores = replace(toolchain.score(model, method="random"), depth={name: DepthPath((pairs,), (0.1,))})
    share = 1 / sum(family_of(model).block_lists(model).values())
    plan = toolchain.plan(model, scores, ratio=0.5, depth_ratio=share, align=4)
    pruned = toolchain.delete_units(model, plan)
    assert plan.blocks == {name: pairs}
    assert plan.widths == widths_of(groups_of(pruned))
    assert toolchain.count_params(pruned) == plan.after.params
    assert {change.group for change in plan.changes if change.after == 0} == {f"{name}.{1 - pairs[0][0]}.attn"} | {
        f"{name}.{1 - pairs[0][1]}.mlp"
    }
    assert (masked_output(shorten(model, plan.blocks), plan, images) - output_of(pruned, images)).abs().max() <= 1e-5
    toolchain.save(pruned, tmp_path / "model")
    assert "upvits" not in json.loads((tmp_path / "model" / "config.json").read_text())
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert type(stock) is type(model)
    assert torch.equal(output_of(stock, images), output_of(pruned, images))


@variants
def test_uniform_results_load_with_stock_timm(variant: Variant, tmp_path: Path) -> None:
    model, images = make(variant), pictures(variant)
    pruned = toolchain.delete_units(model, planned(model, 0.5, ("embed", "attention", "ffn")))
    toolchain.save(pruned, tmp_path / "model")
    assert "upvits" not in json.loads((tmp_path / "model" / "config.json").read_text())
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert type(stock) is type(model)
    assert torch.equal(output_of(stock, images), output_of(pruned, images))


@variants
def test_counts_are_those_of_the_rebuilt_network(variant: Variant) -> None:
    model, images = make(variant), pictures(variant, 1)
    plan = planned(model, 0.5, ("embed", "attention", "ffn"))
    pruned = toolchain.delete_units(model, plan)
    with FlopCounterMode(display=False) as counter:
        output_of(pruned, images)
    assert plan.after.macs * 2 == counter.get_total_flops()
    assert plan.after.params == sum(parameter.numel() for parameter in pruned.parameters())
    assert plan.after.macs < plan.before.macs
    assert plan.before.params == toolchain.count_params(model)


@variants
def test_a_missing_tensor_cannot_hide(variant: Variant, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make(variant)
    toolchain.save(model, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    dropped = sorted(state)[0]
    del state[dropped]
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=dropped):
        toolchain.load(tmp_path / "model")


@variants
def test_segments_chain_up_to_the_forward_pass(variant: Variant) -> None:
    model, images = make(variant), pictures(variant)
    stream = images
    with torch.inference_mode():
        for segment in segments_of(model):
            stream = segment.run(stream)
    assert torch.equal(stream, output_of(model, images))
    lists = family_of(model).block_lists(model)
    blocks = [segment.name for segment in segments_of(model) if segment.kind == "block"]
    assert blocks == [f"{name}.{index}" for name, count in lists.items() for index in range(count)]


@variants
def test_pruning_leaves_the_dense_network_alone(variant: Variant) -> None:
    model, images = make(variant), pictures(variant)
    before = output_of(model, images)
    pruned = toolchain.delete_units(model, planned(model, 0.5, ("ffn",)))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert torch.equal(output_of(model, images), before)


@variants
def test_pruned_networks_train(variant: Variant) -> None:
    model, images = make(variant), pictures(variant)
    pruned = toolchain.delete_units(model, planned(model, 0.5, ("embed", "attention", "ffn"))).train()
    pruned(images).square().sum().backward()
    silent = [name for name, p in pruned.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("vit_giant_patch14_dinov2", "gated MLPs"),
        ("vit_small_patch16_18x2_224", "parallel"),
        ("vit_base_patch16_siglip_224", "attention pooling"),
        ("vit_base_patch16_xp_224", "qk-norm|norm"),
        ("vit_base_patch16_rope_reg1_gap_256", "not supported"),
        ("swin_tiny_patch4_window7_224", "not supported"),
    ],
)
def test_unsupported_models_are_refused_with_what_is_supported(architecture: str, reason: str) -> None:
    if not timm.is_model(architecture):
        pytest.skip(f"this timm has no {architecture}")
    with torch.device("meta"):
        model = timm.create_model(architecture)
    with pytest.raises(UserError, match=reason) as caught:
        family_of(model)
    assert "PVTv2" in str(caught.value)
    assert "VisionTransformer" in str(caught.value)
