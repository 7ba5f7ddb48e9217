"""Heads in another basis: the same function, with dims that can be cut from the end."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits import toolchain
from upvits.toolchain.compensation.gradients import output_gradients
from upvits.toolchain.compensation.heads import LEAST_WEIGHT, rotate_heads
from upvits.toolchain.families import groups_of
from upvits.toolchain.scores.backward import frozen, signs_of
from upvits.toolchain.scores.divergence import divergence

DEIT, PVT = VARIANTS[0], VARIANTS[7]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def relative_gap(expected: Tensor, actual: Tensor) -> float:
    return float(((expected - actual).abs().max() / expected.abs().max()).detach())


def attentions(model: nn.Module) -> dict[str, Any]:
    return {group.name: model.get_submodule(group.name) for group in groups_of(model) if group.kind == "attention"}


def parts(attention: Any) -> tuple[tuple[nn.Linear, slice], ...]:
    """Layer and rows of q, k and v."""
    dim = attention.num_heads * attention.head_dim
    if hasattr(attention, "qkv"):
        return tuple((attention.qkv, slice(i * dim, (i + 1) * dim)) for i in range(3))
    return ((attention.q, slice(None)), (attention.kv, slice(0, dim)), (attention.kv, slice(dim, 2 * dim)))


@torch.no_grad()
def drop(attention: Any, count: int, which: tuple[int, ...] = (0, 2)) -> None:
    """Switch off the last `count` dims of every head of q (0), k (1) or v (2)."""
    for index in which:
        layer, rows = parts(attention)[index]
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor[rows].view(attention.num_heads, attention.head_dim, -1)[:, attention.head_dim - count :] = 0


@variants
@torch.inference_mode()
def test_turning_keeps_the_function_in_stock_classes(variant: Variant, tmp_path: Path) -> None:
    model, images = make(variant), pictures(variant, 8)
    rotation = rotate_heads(model, images)
    toolchain.save(rotation.model, tmp_path / "model")
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert type(stock) is type(model)
    others = pictures(variant, 16)[8:]
    assert relative_gap(model(others), stock(others)) < 1e-5
    for name, attention in attentions(model).items():
        (old, rows), (new, _) = parts(attention)[0], parts(stock.get_submodule(name))[0]
        assert not torch.allclose(old.weight[rows], new.weight[rows], atol=1e-2)


@variants
@torch.inference_mode()
def test_dims_that_do_nothing_end_up_last(variant: Variant) -> None:
    """Half the dims of every head are made redundant, hidden behind a random basis, and found."""
    model, images = make(variant), pictures(variant, 8)
    generator = torch.Generator().manual_seed(5)
    for attention in attentions(model).values():
        heads, dim = attention.num_heads, attention.head_dim
        for index in (0, 2):
            mix = torch.randn(heads, dim, dim // 2, generator=generator) @ torch.randn(
                heads, dim // 2, dim, generator=generator
            )
            layer, rows = parts(attention)[index]
            layer.weight[rows] = (mix @ layer.weight[rows].view(heads, dim, -1)).flatten(0, 1) / dim
            layer.bias[rows] = (mix @ layer.bias[rows].view(heads, dim, -1)).flatten() / dim
    rotation = rotate_heads(model, images)
    for name, attention in attentions(rotation.model).items():
        half = attention.head_dim // 2
        drop(attention, attention.head_dim - half)
        assert rotation.logit_error[name][:, half].max() < 1e-5 * rotation.logit_error[name][:, -1].max()
        assert rotation.output_error[name][:, half].max() < 1e-5 * rotation.output_error[name][:, -1].max()
    assert relative_gap(model(images), rotation.model(images)) < 1e-4


@pytest.mark.parametrize("variant", [DEIT, VARIANTS[8]], ids=str)
@torch.inference_mode()
def test_logit_errors_foretold_are_those_that_happen(variant: Variant) -> None:
    """On one image, where every query meets every key, the forecast is exact."""
    model, image = make(variant), pictures(variant, 1)
    name = next(iter(attentions(model)))
    rotation = rotate_heads(model, image, [name], seed=4)
    writer = f"{name}.proj"
    passes = output_gradients(frozen(model), [writer], image, signs_of(4, [0]))
    gradients = next(found[writer][1] for found in passes if writer in found)
    weights = gradients[:, 0].double().square().sum(dim=(0, 2))
    weights += LEAST_WEIGHT * weights.mean()
    attention: Any = rotation.model.get_submodule(name)
    seen: dict[int, Tensor] = {}
    for index in (0, 1):
        layer, rows = parts(attention)[index]
        layer.register_forward_hook(lambda _, __, out, index=index, rows=rows: seen.update({index: out[..., rows]}))
    rotation.model(image)
    heads, dim, count = attention.num_heads, attention.head_dim, attention.head_dim // 3
    q, k = (seen[i][0].double().view(-1, heads, dim)[..., dim - count :].transpose(0, 1) for i in (0, 1))
    logits = q @ k.transpose(1, 2) * attention.scale
    squared = (logits - logits.mean(dim=2, keepdim=True)).square().mean(dim=2)
    happened = (squared * weights).sum(dim=1) / weights.sum()
    torch.testing.assert_close(happened, rotation.logit_error[name][:, count], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("variant", [DEIT, VARIANTS[3], PVT], ids=str)
@torch.inference_mode()
def test_losses_foretold_are_about_those_that_happen(variant: Variant) -> None:
    model, images = make(variant), pictures(variant, 64)
    rotation = rotate_heads(model, images)
    scale = None if model.num_classes else 1.0
    for name in attentions(model):
        cut = copy.deepcopy(rotation.model)
        attention: Any = cut.get_submodule(name)
        count = attention.head_dim // 2
        drop(attention, count, which=(2,))
        happened = float(divergence(model(images), cut(images), scale).mean())
        foretold = float(rotation.output_error[name][:, count].sum())
        assert 0.2 < happened / foretold < 5


@variants
def test_errors_grow_from_zero_ever_faster(variant: Variant) -> None:
    model, images = make(variant), pictures(variant, 8)
    rotation = rotate_heads(model, images)
    for name, attention in attentions(model).items():
        for errors in (rotation.logit_error[name], rotation.output_error[name]):
            assert errors.shape == (attention.num_heads, attention.head_dim + 1)
            assert (errors[:, 0] == 0).all()
            assert (errors.diff(dim=1) >= 0).all()
            assert errors[:, -1].min() > 0
        growth = rotation.logit_error[name].diff(dim=1)
        assert (growth.diff(dim=1) >= -1e-9 * growth.max()).all()


@torch.inference_mode()
def test_cutting_turned_heads_loses_less_than_any_choice_of_dims() -> None:
    model, images = make(DEIT), pictures(DEIT, 64)
    rotated = rotate_heads(model, images[:48]).model
    for attention in attentions(rotated).values():
        drop(attention, 8)
    gap = (model(images[48:]) - rotated(images[48:])).square().mean()
    for seed in range(5):
        other = make(DEIT)
        for attention in attentions(other).values():
            order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
            for index in (0, 2):
                layer, rows = parts(attention)[index]
                layer.weight[rows].view(3, 16, -1)[:, order[:8]] = 0
                layer.bias[rows].view(3, 16)[:, order[:8]] = 0
        assert gap < (model(images[48:]) - other(images[48:])).square().mean() / 2


@torch.inference_mode()
def test_only_the_named_groups_are_turned() -> None:
    model, images = make(PVT), pictures(PVT, 4)
    rotation = rotate_heads(model, images, ["stages.1.blocks.0.attn"])
    changed = {n for n, p in rotation.model.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {
        f"stages.1.blocks.0.attn.{n}"
        for n in ("q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias")
    }
    assert set(rotation.logit_error) == set(rotation.output_error) == {"stages.1.blocks.0.attn"}


@torch.inference_mode()
def test_a_single_key_per_image_does_not_blow_weights_up() -> None:
    """A PVTv2 at 32 px: softmax over one key is 1, and keys have no covariance within an image."""
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    turned = rotate_heads(model.eval(), images[:8]).model
    largest = max(float(tensor.detach().abs().max()) for name, tensor in turned.named_parameters() if ".attn." in name)
    assert largest < 1e3
    with torch.inference_mode():
        assert relative_gap(model(images[8:]), turned(images[8:])) < 1e-5


@pytest.mark.parametrize("variant", [DEIT, PVT], ids=str)
def test_heads_with_unequal_dims_are_turned_again(variant: Variant) -> None:
    """A network that was pruned once and is pruned a second time."""
    model, images = make(variant), pictures(variant, 16)
    scores = toolchain.score(model, method="magnitude")
    plan = toolchain.plan(model, scores, target_macs=0.9, planner="uniform", align=1, components=("qk_v",))
    keep = {name: units if name.endswith(".qk") else units[: len(units) // 2] for name, units in plan.keep.items()}
    once = toolchain.delete_units(model, replace(plan, keep={n: tuple(u) for n, u in keep.items()})).eval()
    turned = rotate_heads(once, images[:8])
    assert set(turned.logit_error) == {group.module for group in groups_of(once) if group.kind == "v"}
    weights = dict(once.named_parameters())
    assert all(
        not torch.equal(weights[f"{name}.proj.weight"], turned.model.get_parameter(f"{name}.proj.weight"))
        for name in turned.logit_error
    )
    with torch.inference_mode():
        assert relative_gap(once(images[8:]), turned.model(images[8:])) < 1e-5


def test_heads_without_biases() -> None:
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=2, num_classes=5, qkv_bias=False
    ).eval()
    images = pictures(DEIT, 8)
    rotated = rotate_heads(model, images).model
    assert rotated.get_submodule("blocks.0.attn.qkv").bias is None
    assert relative_gap(model(images), rotated(images)) < 1e-4


@torch.inference_mode()
def test_a_branch_that_nothing_depends_on() -> None:
    model, images = make(DEIT), pictures(DEIT, 4)
    model.get_parameter("head.weight").zero_()
    rotation = rotate_heads(model, images)
    assert relative_gap(model(images), rotation.model(images)) < 1e-5
    assert all(parameter.isfinite().all() for parameter in rotation.model.parameters())
