"""The stage streams of a PVTv2 in another basis: exact where theory says so, cheap elsewhere, and told to the refit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.compensation import compress
from upvits.toolchain.compensation.pvt_stream import (
    RotatedStages,
    cut_stages,
    measure_stages,
    rotate_stages,
    stages_can_rotate,
)
from upvits.toolchain.compensation.statistics import observe
from upvits.toolchain.families import segments_of
from upvits.toolchain.planning import Component, PruningPlan
from upvits.toolchain.scores.divergence import divergence

PVTS = [variant for variant in VARIANTS if variant.family == "pvt_v2"]
B0, B1, LINEAR = PVTS
WIDTHS = (16, 32, 40, 64)
HALF = {f"stages.{index}": range(width // 2) for index, width in enumerate(WIDTHS)}


def smooth(variant: Variant, count: int, seed: int = 1) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images: Tensor = nn.functional.interpolate(coarse, size=(variant.size, variant.size), mode="bicubic")
    return images


@torch.inference_mode()
def output_of(model: nn.Module, images: Tensor) -> Tensor:
    result: Tensor = model(images)
    return result


def relative_gap(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


def projector(size: int, dims: int, seed: int) -> Tensor:
    """Onto `dims` random dimensions in which tokens have mean zero."""
    draws = torch.randn(size, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(draws - draws.mean(dim=0)).Q
    result: Tensor = basis @ basis.T
    return result


@torch.no_grad()
def confine(layer: nn.Module, projection: Tensor) -> None:
    for parameter in layer.parameters():
        parameter.copy_(torch.einsum("ij,j...->i...", projection, parameter.double()))


def confined(variant: Variant, embedding_weight: float = 1.5) -> nn.Module:
    """The variant with streams and reductions that need half their channels, and one weight in each embedding's norm.

    Such a network loses nothing: all norms but those of the embeddings, and all biases, are still random.
    """
    model: Any = make(variant)
    for index, (stage, width) in enumerate(zip(model.stages, WIDTHS, strict=True)):
        projection = projector(width, width // 2 - 2, index)  # the bias of the embedding's norm is one more dimension
        embedding = model.patch_embed if index == 0 else stage.downsample
        confine(embedding.proj, projection)
        embedding.norm.weight.data.fill_(embedding_weight)
        for block in stage.blocks:
            confine(block.attn.proj, projection)
            confine(block.mlp.fc2, projection)
            if block.attn.sr is not None:
                confine(block.attn.sr, projector(width, width // 2 - 1, index + 10))
    return model  # type: ignore[no-any-return]


def cut_by_energy(model: nn.Module, images: Tensor) -> RotatedStages:
    """Cut with all directions equally important, so that those with energy stay."""
    moments = {
        name: replace(found, importance=torch.eye(len(found.second), dtype=torch.float64))
        for name, found in measure_stages(model, images).items()
    }
    return cut_stages(model, moments, HALF)


@pytest.mark.parametrize("variant", [B0, B1], ids=str)
def test_directions_without_energy_cost_nothing(variant: Variant) -> None:
    """Scales, biases of all norms, padding and spatial reduction must all be right."""
    model, images = confined(variant), smooth(variant, 24)
    rotated = cut_by_energy(model, images)
    assert relative_gap(output_of(model, images), output_of(rotated.model, images)) < 1e-4
    assert all(share == pytest.approx(1) for share in rotated.kept_energy.values())
    assert rotated.model.get_parameter("stages.1.downsample.proj.weight").shape == (16, 8, 3, 3)
    assert rotated.model.get_parameter("stages.1.blocks.0.attn.sr.weight").shape[:2] == (16, 16)
    assert type(rotated.model) is type(model)


def test_a_small_embedding_feels_the_same_eps() -> None:
    model, images = confined(B0), smooth(B0, 24)
    with torch.no_grad():
        for name in ("patch_embed.proj", "stages.2.downsample.proj"):
            for parameter in model.get_submodule(name).parameters():
                parameter.mul_(1e-3)  # variances of the order of eps
    rotated = cut_by_energy(model, images)
    assert relative_gap(output_of(model, images), output_of(rotated.model, images)) < 1e-4


def test_the_maps_tell_what_became_of_streams_and_layers() -> None:
    model, images = confined(B0), smooth(B0, 24)
    rotated = cut_by_energy(model, images)
    assert set(rotated.stream_maps) == set(HALF)
    before, after = images, images
    with torch.inference_mode():
        for old, new in zip(segments_of(model)[:-1], segments_of(rotated.model)[:-1], strict=True):
            before, after = old.run(before), new.run(after)
            stage = "stages.0" if old.name == "patch_embed" else ".".join(old.name.split(".")[:2])
            assert relative_gap(before.double() @ rotated.stream_maps[stage].T, after.double()) < 1e-4
    reductions = {f"stages.{index}.blocks.0.attn.sr" for index in range(3)}
    assert set(rotated.layer_maps) == reductions | {
        "patch_embed.proj",
        *(f"stages.{index}.downsample.proj" for index in (1, 2, 3)),
    }
    for name, turn in rotated.layer_maps.items():
        (old_output,) = observe(model, images, [(model.get_submodule(name), "output")])
        (new_output,) = observe(rotated.model, images, [(rotated.model.get_submodule(name), "output")])
        expected = torch.einsum("kd,bdhw->bkhw", turn, old_output.detach().double())
        assert relative_gap(expected, new_output.detach().double()) < 1e-4


@pytest.mark.parametrize("variant", PVTS, ids=str)
def test_turning_loses_less_than_deleting(variant: Variant) -> None:
    """Also with weights per channel in the embeddings' norms, where a rotation is not exact."""
    model, images = make(variant), smooth(variant, 40)
    seen, held = images[:32], images[32:]
    plan = toolchain.plan(
        model, toolchain.score(model, method="magnitude"), ratio=1 / 4, align=1, components=("embed",)
    )
    deleted = divergence(output_of(model, held), output_of(toolchain.delete_units(model, plan).eval(), held)).mean()
    rotated = rotate_stages(model, seen, plan.keep).model
    assert divergence(output_of(model, held), output_of(rotated, held)).mean() < deleted / 2


def test_stages_that_keep_their_width_stay_as_they_are() -> None:
    model, images = make(B0), smooth(B0, 8)
    moments = measure_stages(model, images)
    whole = cut_stages(model, moments, {"stages.1": range(32)})
    assert torch.equal(output_of(model, images), output_of(whole.model, images))
    assert whole.stream_maps == whole.layer_maps == {}
    one = cut_stages(model, moments, {"stages.1": range(24)})
    assert set(one.stream_maps) == {"stages.1"}
    before, after = model.state_dict(), one.model.state_dict()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert {name.split(".")[1] for name in changed} == {"1", "2"}
    assert {name for name in changed if name.startswith("stages.2")} == {"stages.2.downsample.proj.weight"}


def test_linear_attention_keeps_the_channels_that_were_chosen() -> None:
    model, images = make(LINEAR), smooth(LINEAR, 8)
    kept = (1, 2, 5, 7, 11, 13)
    rotated = rotate_stages(model, images, {"stages.0": kept})
    turn = rotated.layer_maps["stages.0.blocks.0.attn.sr"]
    assert torch.equal(turn, torch.eye(16, dtype=torch.float64)[list(kept)])
    name = "stages.0.blocks.0.attn.norm.bias"
    assert torch.equal(rotated.model.get_parameter(name), model.get_parameter(name)[list(kept)])


def test_moments_do_not_depend_on_batches_and_repeat_themselves() -> None:
    model, images = make(B0), smooth(B0, 12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, parts = measure_stages(model, images, batch_size=12), measure_stages(model, images, batch_size=5)
    for name, found in whole.items():
        torch.testing.assert_close(found.second, parts[name].second, rtol=1e-4, atol=1e-4)
    again = rotate_stages(model, images, HALF).stream_maps
    assert all(torch.equal(again[name], turn) for name, turn in rotate_stages(model, images, HALF).stream_maps.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def plan_of(model: nn.Module, components: tuple[Component, ...]) -> PruningPlan:
    scores = toolchain.score(model, method="magnitude")
    return toolchain.plan(model, scores, ratio=0.5, align=1, components=components)


def test_compress_rotates_stages_and_gives_the_refit_right_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rotation is exact every layer finds what it aims at, and is left alone."""
    monkeypatch.setattr("upvits.toolchain.compensation.basis.EVENNESS", 1e9)  # directions with energy stay
    model = confined(B0)
    result = compress(model, plan_of(model, ("embed",)), smooth(B0, 100))
    assert set(HALF) <= set(result.report.rotated)
    assert {layer.layer: layer.action for layer in result.report.layers if layer.action != "exact"} == {}
    assert result.report.layers
    assert result.report.kl < 1e-4 * result.report.kl_deleted


@pytest.mark.parametrize("variant", [B0, LINEAR], ids=str)
def test_compress_loses_less_with_the_rotation(variant: Variant) -> None:
    model, images = make(variant), smooth(variant, 100)
    plan = plan_of(model, ("embed", "attention", "ffn"))
    rotated, chosen = (compress(model, plan, images, rotate=rotate) for rotate in (True, False))
    assert rotated.report.kl < chosen.report.kl
    shapes = [{name: p.shape for name, p in result.model.named_parameters()} for result in (rotated, chosen)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("width", [0, 1, 17])
def test_widths_out_of_range_are_refused(width: int) -> None:
    with pytest.raises(UserError, match="cannot be cut"):
        rotate_stages(make(B0), pictures(B0), {"stages.0": range(width)})


def test_networks_that_cannot_take_the_rotation_back_are_refused() -> None:
    with pytest.raises(UserError, match=r"stages.* cannot be rotated|cannot be rotated"):
        rotate_stages(make(VARIANTS[0]), pictures(VARIANTS[0]), {})
    features = timm.create_model("pvt_v2_b0", **{**B0.args, "num_classes": 0})
    assert "no head" in str(stages_can_rotate(features))
    without_bias = timm.create_model("pvt_v2_b0", **{**B0.args, "qkv_bias": False})
    assert "attn.q has no bias" in str(stages_can_rotate(without_bias))
    assert stages_can_rotate(make(LINEAR)) is None
