"""From a plan to a compressed network: what it must be, and what it must never be."""

import copy
import json
import sys
from dataclasses import asdict, replace

import pytest
import timm
import torch
from torch import Tensor, nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.compensation import compress, with_joint_units
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.planning import Component, Curve, PruningPlan
from upvits.toolchain.scores import divergence
from upvits.toolchain.structure.groups import widths_of
from upvits.toolchain.surgery.deletion import cut_out

VIT = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "num_classes": 5}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **(VIT if "deit" in name else PVT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # random timm weights are so small that blocks hardly matter
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def images(count: int, size: int = 32, seed: int = 1) -> Tensor:
    """Smooth ones, as photographs are."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


def kl(model: nn.Module, other: nn.Module, batch: Tensor) -> float:
    with torch.inference_mode():
        return float(divergence(model(batch), other(batch)).mean())


def halved(model: nn.Module, components: tuple[Component, ...]) -> toolchain.PruningPlan:
    scores = toolchain.score(model, method="magnitude")
    return toolchain.plan(model, scores, ratio=0.5, align=1, components=components)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0"])
@pytest.mark.parametrize("rotate", [True, False])
def test_the_result_has_the_plans_widths_and_loses_less(name: str, rotate: bool) -> None:
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    plan = halved(model, ("embed", "attention", "ffn"))
    side = 32 if "deit" in name else 64
    result = compress(model, plan, images(150, side), rotate=rotate)
    pruned = toolchain.delete_units(model, plan).eval()
    assert type(result.model) is type(pruned)
    assert widths_of(groups_of(result.model)) == plan.widths
    assert {k: v.shape for k, v in result.model.state_dict().items()} == {
        k: v.shape for k, v in pruned.state_dict().items()
    }
    assert result.report.accepted
    share = 0.5 if "deit" in name else 0.65 if rotate else 0.9  # only 4 of 8 channels are left in the first stage
    assert result.report.kl < share * result.report.kl_deleted
    unseen = images(64, side, seed=2)
    assert kl(model, result.model, unseen) < share * kl(model, pruned, unseen)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    document = json.loads(json.dumps(asdict(result.report)))
    assert document["images"] == 150
    assert document["held_out"] == 30
    assert {layer["action"] for layer in document["layers"]} <= {"refit", "bias", "kept", "exact", "skipped"}
    assert all(layer["error_after"] <= layer["error_before"] for layer in document["layers"])
    assert all(parameter.requires_grad for parameter in result.model.parameters())


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0"])
def test_qk_and_v_dims_are_cut_each_from_its_own_tail(name: str) -> None:
    model = network(name)
    keep = {}
    for group in groups_of(model):
        if group.kind in ("qk", "v"):
            dims = torch.arange(group.size).view(group.num_heads, group.head_dim)
            left = group.head_dim // 4 if group.kind == "qk" else 3 * group.head_dim // 4
            keep[group.name] = tuple(dims[:, :left].flatten().tolist())
    plan = replace(halved(model, ("qk_v",)), keep=keep)
    batch = images(150, 32 if "deit" in name else 64)
    result = compress(model, plan, batch)
    assert {group.name: group.size for group in groups_of(result.model) if group.kind in ("qk", "v")} == {
        group: len(units) for group, units in keep.items()
    }
    assert set(result.report.rotated) == {name.rpartition(".")[0] for name in keep}
    assert result.report.kl_cut < 0.5 * result.report.kl_deleted
    assert result.report.kl < 0.3 * result.report.kl_deleted
    own = replace(plan, keep=_halves(result.model), model_digest=weights_digest(result.model))
    again = compress(result.model, own, batch)  # unequal dims to begin with
    assert again.report.accepted
    assert set(again.report.rotated) == set(result.report.rotated)
    # its heads were turned already, so that plain deletion takes the right dims: only the refit is new
    assert again.report.kl < 0.9 * again.report.kl_deleted


def _halves(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The first half of every head's value dims."""
    dims = {g.name: torch.arange(g.size).view(g.num_heads, -1) for g in groups_of(model) if g.kind == "v"}
    return {name: tuple(own[:, : own.shape[1] // 2].flatten().tolist()) for name, own in dims.items()}


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0"])
def test_a_cut_of_redundant_units_is_undone(name: str) -> None:
    """Every FFN unit has a twin: without one of them the network can still compute the same."""
    model = network(name)
    keep = {}
    with torch.no_grad():
        for group in groups_of(model):
            if group.kind != "ffn":
                continue
            mlp = model.get_submodule(group.name)
            half = group.size // 2
            for parameter in ("fc1.weight", "fc1.bias", "dwconv.weight", "dwconv.bias"):
                if parameter in dict(mlp.named_parameters()):
                    tensor = mlp.get_parameter(parameter)
                    tensor[half:] = tensor[:half]
            keep[group.name] = tuple(range(half))
    plan = halved(model, ("ffn",))
    plan = replace(plan, keep=keep)
    batch = images(200, 32 if "deit" in name else 64)
    deleted = kl(model, toolchain.delete_units(model, plan).eval(), batch)
    assert kl(model, compress(model, plan, batch).model, batch) < 1e-4 * deleted


def test_curves_choose_the_ffn_units() -> None:
    """Units 0 to 31 are worth nothing, and so says the curve; the plan keeps them nevertheless."""
    model = network("deit_tiny_patch16_224")
    with torch.no_grad():
        for index in (0, 1):
            model.get_submodule(f"blocks.{index}.mlp.fc2").get_parameter("weight")[:, :32] = 0
    plan = replace(halved(model, ("ffn",)), keep={f"blocks.{i}.mlp": tuple(range(160)) for i in (0, 1)})
    curve = Curve(torch.arange(192), torch.zeros(193))
    curves = {f"blocks.{i}.mlp": curve for i in (0, 1)}
    joint = with_joint_units(plan, curves)
    assert joint.keep == {f"blocks.{i}.mlp": tuple(range(32, 192)) for i in (0, 1)}
    worse, better = (compress(model, own, images(80)).report.kl for own in (plan, joint))
    assert better < 1e-6 * worse


def test_the_same_images_give_the_same_network() -> None:
    model = network("deit_tiny_patch16_224")
    plan = halved(model, ("embed", "attention", "ffn"))
    first, second = (compress(model, plan, images(60)).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_blocks_that_left_are_made_up_for() -> None:
    """The writers before a block that was taken out aim at the stream after it."""
    model = network("deit_tiny_patch16_224")
    with torch.no_grad():
        for name in ("blocks.1.attn.proj", "blocks.1.mlp.fc2"):
            model.get_submodule(name).get_parameter("weight").mul_(0.3)
    plan = replace(halved(model, ("ffn",)), keep={}, num_heads={}, blocks={"blocks": ((0, 0),)})
    result = compress(model, plan, images(150))
    assert len(result.model.get_submodule("blocks")) == 1  # type: ignore[arg-type]
    assert result.report.kl < 0.7 * result.report.kl_cut


def test_a_network_that_is_worse_than_plain_pruning_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module, *_: object, **__: object) -> list[object]:
        with torch.no_grad():
            model.get_submodule("head").get_parameter("weight").mul_(-3)
        return []

    monkeypatch.setattr(sys.modules["upvits.toolchain.compensation.compress"], "refit", spoil)
    model = network("deit_tiny_patch16_224")
    plan = halved(model, ("ffn",))
    result = compress(model, plan, images(20))
    pruned = toolchain.delete_units(model, plan).state_dict()
    assert "the refit was left out" in result.report.warnings[-1]
    assert result.report.kl == result.report.kl_cut == result.report.kl_deleted  # no basis is turned for FFN units
    assert all(torch.equal(pruned[key], tensor) for key, tensor in result.model.state_dict().items())

    def spoiled(base: nn.Module, plan: PruningPlan) -> nn.Module:
        small = cut_out(base, plan)
        spoil(small)
        return small

    monkeypatch.setattr(sys.modules["upvits.toolchain.compensation.compress"], "cut_out", spoiled)
    result = compress(model, plan, images(20))
    assert not result.report.accepted
    assert "plain pruning was better" in result.report.warnings[-1]
    assert result.report.kl == result.report.kl_deleted
    assert all(torch.equal(pruned[key], tensor) for key, tensor in result.model.state_dict().items())


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0"])
def test_a_network_without_a_head_is_held_against_the_features_that_stay(name: str) -> None:
    model: nn.Module = network(name)
    model.reset_classifier(0)  # type: ignore[operator]
    plan = halved(model, ("embed", "ffn"))
    result = compress(model, plan, images(60, 32 if "deit" in name else 64))
    assert 0 < result.report.kl <= result.report.kl_deleted


def test_the_plan_of_another_network_is_refused() -> None:
    plan = halved(network("deit_tiny_patch16_224"), ("ffn",))
    other = network("deit_tiny_patch16_224")
    with torch.no_grad():
        other.get_submodule("head").get_parameter("weight").mul_(2)
    with pytest.raises(UserError, match="another network"):
        toolchain.delete_units(other, plan)
    with pytest.raises(UserError, match="another network"):
        compress(other, plan, images(20))


def test_too_few_images_are_refused_with_the_number_that_would_do() -> None:
    model = network("deit_tiny_patch16_224")
    plan = halved(model, ("ffn",))
    with pytest.raises(UserError, match="at least 10"):
        compress(model, plan, images(4))
    with pytest.raises(UserError, match=r"Give \d\d+ images or more"):
        compress(model, plan, images(10))
