"""The stream in another basis: nothing is lost at full width, little at less, and the result is a stock network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.compensation.fold import fold, stream_axes, stream_can_rotate
from upvits.toolchain.compensation.stream import Rotated, cut_stream, measure_stream, rotate_stream
from upvits.toolchain.families import segments_of
from upvits.toolchain.scores.divergence import divergence

DEIT = VARIANTS[0]
rotatable = pytest.mark.parametrize("variant", [v for v in VARIANTS if stream_can_rotate(make(v)) is None], ids=str)


def relative_gap(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


@torch.inference_mode()
def output_of(model: nn.Module, images: Tensor) -> Tensor:
    result: Tensor = model(images)
    return result


def confined(variant: Variant, dims: int) -> nn.Module:
    """The variant with a stream that stays in `dims` dimensions."""
    model = fold(make(variant))
    draws = torch.randn(48, dims, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis = torch.linalg.qr(draws - draws.mean(dim=0)).Q
    for parameter, axis in stream_axes(model):
        parameter.data = (parameter.data.movedim(axis, -1) @ basis @ basis.T).movedim(-1, axis)
    return model.float()


@rotatable
def test_at_full_width_stock_timm_loads_the_same_function(variant: Variant, tmp_path: Path) -> None:
    model, images = make(variant), pictures(variant, 8)
    rotated = rotate_stream(model, images, 48)
    toolchain.save(rotated.model, tmp_path / "model")
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert type(stock) is type(model)
    assert relative_gap(output_of(model, images), output_of(stock, images)) < 1e-5
    assert rotated.kept_energy == pytest.approx(1)
    weight = model.get_parameter("blocks.0.mlp.fc2.weight")
    assert not torch.allclose(stock.get_parameter("blocks.0.mlp.fc2.weight"), weight, atol=0.05)


def cut_by_energy(model: nn.Module, images: Tensor, width: int) -> Rotated:
    """Cut with all directions equally important, so that those with energy stay."""
    moments = measure_stream(model, images)
    return cut_stream(model, replace(moments, importance=torch.eye(48, dtype=torch.float64)), width)


@rotatable
def test_directions_without_energy_cost_nothing(variant: Variant) -> None:
    """A stream of 31 dimensions fits into 32 channels: scale, biases and tokens must all be right."""
    model, images = confined(variant, 31), pictures(variant, 16)
    rotated = cut_by_energy(model, images, 32)
    assert rotated.kept_energy == pytest.approx(1)
    assert rotated.model.get_parameter("blocks.0.attn.proj.weight").shape == (32, 48)
    assert relative_gap(output_of(model, images), output_of(rotated.model, images)) < 1e-4


def test_a_small_stream_feels_the_same_eps() -> None:
    model, images = confined(DEIT, 31), pictures(DEIT, 16)
    for parameter, _ in stream_axes(model):
        parameter.data *= 1e-3  # variances of the order of eps
    rotated = cut_by_energy(model, images, 32)
    assert relative_gap(output_of(model, images), output_of(rotated.model, images)) < 1e-4


def test_the_map_tells_what_became_of_the_stream() -> None:
    model, images = make(DEIT), pictures(DEIT, 16)
    rotated = rotate_stream(model, images, 32)
    with torch.inference_mode():
        before = segments_of(model)[0].run(images).double()
        after = segments_of(rotated.model)[0].run(images).double()
    torch.testing.assert_close(before @ rotated.stream_map.T, after, rtol=0, atol=1e-5)
    product = rotated.stream_map @ rotated.stream_map.T * 48 / 32
    torch.testing.assert_close(product, torch.eye(32, dtype=torch.float64) - 1 / 32)


@rotatable
def test_turning_loses_less_than_deleting(variant: Variant) -> None:
    model, images = make(variant), pictures(variant, 40)
    seen, held = images[:32], images[32:]
    plan = toolchain.plan(
        model, toolchain.score(model, method="magnitude"), ratio=1 / 3, align=1, components=("embed",)
    )
    deleted = divergence(output_of(model, held), output_of(toolchain.delete_units(model, plan), held)).mean()
    rotated = rotate_stream(model, seen, 32).model
    assert divergence(output_of(model, held), output_of(rotated, held)).mean() < deleted / 2


def test_moments_do_not_depend_on_batches_and_repeat_themselves() -> None:
    model, images = make(DEIT), pictures(DEIT, 12)
    whole, parts = measure_stream(model, images, batch_size=12), measure_stream(model, images, batch_size=5)
    torch.testing.assert_close(whole.second, parts.second, rtol=1e-5, atol=1e-5)
    again = measure_stream(model, images, batch_size=12)
    assert torch.equal(whole.importance, again.importance)
    assert torch.equal(cut_stream(model, whole, 24).stream_map, rotate_stream(model, images, 24).stream_map)


def test_what_the_output_needs_stays() -> None:
    """Where all directions have the same energy, importance alone decides."""
    model, images = make(DEIT), pictures(DEIT, 8)
    draws = torch.randn(48, 47, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis = torch.linalg.qr(draws - draws.mean(dim=0)).Q
    moments = replace(
        measure_stream(model, images),
        second=torch.eye(48, dtype=torch.float64),
        importance=basis[:, :23] @ basis[:, :23].T,
    )
    kept = cut_stream(model, moments, 24).stream_map @ basis
    assert kept[:, 23:].abs().max() < 1e-10
    assert kept[:, :23].norm(dim=0).min() > 0.7  # sqrt(24 / 48)


@pytest.mark.parametrize("width", [0, 1, 49])
def test_widths_out_of_range_are_refused(width: int) -> None:
    with pytest.raises(UserError, match="cannot be cut"):
        rotate_stream(make(DEIT), pictures(DEIT), width)


def test_a_fixed_stream_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be rotated"):
        rotate_stream(make(VARIANTS[7]), pictures(VARIANTS[7]), 16)
