"""Ridge regressions of single layers, and of whole networks whose cut can be undone exactly."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from upvits.toolchain.compensation.refit import Targets, refit, solve
from upvits.toolchain.compensation.statistics import Moments, input_rows, linear_layers, observe, output_rows, split
from upvits.toolchain.families import groups_of, segments_of


def moments(x: Tensor, y: Tensor) -> Moments:
    result = Moments.zeros(x.shape[1], y.shape[1], x.device)
    result.add(x[: len(x) // 2], y[: len(x) // 2])
    result.add(x[len(x) // 2 :], y[len(x) // 2 :])
    return result


def problem(rows: int, seed: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(7, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64) + 5  # far from zero: the bias matters
    y = torch.cat([x, torch.ones(rows, 1)], dim=1) @ truth
    return x, y + noise * torch.randn(rows, 3, generator=generator, dtype=torch.float64)


def test_error_of_moments_is_the_mean_squared_error() -> None:
    x, y = problem(50, 0, noise=0.5)
    coefficients = torch.randn(7, 3, dtype=torch.float64)
    direct = (torch.cat([x, torch.ones(50, 1)], dim=1) @ coefficients - y).square().sum(dim=1).mean()
    assert moments(x, y).error(coefficients) == pytest.approx(float(direct), rel=1e-9)
    assert moments(x, y).variance() == pytest.approx(float(y.var(dim=0, unbiased=False).sum()), rel=1e-9)


def test_weights_of_rows_count_them_repeatedly() -> None:
    x, y = problem(4, 0)
    weighted = Moments.zeros(6, 3, x.device)
    weighted.add(x, y, torch.tensor([2.0, 1.0, 0.0, 1.0]))
    repeated = moments(x[[0, 0, 1, 3]], y[[0, 0, 1, 3]])
    torch.testing.assert_close(weighted.xx, repeated.xx)
    torch.testing.assert_close(weighted.xy, repeated.xy)
    torch.testing.assert_close(weighted.yy, repeated.yy)


def test_a_linear_layer_is_recovered_with_its_bias() -> None:
    now = torch.zeros(7, 3, dtype=torch.float64)
    report, coefficients = solve("fc2", now, moments(*problem(200, 0)), moments(*problem(50, 1)), has_bias=True)
    assert coefficients is not None
    assert report.action == "refit"
    assert report.error_after < 1e-8 < 1 < report.error_before
    assert report.condition < 100


def test_without_a_bias_none_is_invented() -> None:
    x, _ = problem(200, 0)
    y = x[:, :3] * 2
    report, coefficients = solve("qkv", torch.zeros(7, 3).double(), moments(x, y), moments(x, y), has_bias=False)
    assert coefficients is not None
    assert coefficients[-1].abs().max() == 0
    assert report.error_after < 1e-6


def test_what_is_worse_on_held_out_rows_is_not_accepted() -> None:
    x, y = problem(200, 0)
    now = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], dim=1), y + 0.01 * x[:, :3]).solution
    shifted = moments(x, y + 0.01 * x[:, :3])  # the present weights are right for these
    wrong = moments(x, -y)
    report, coefficients = solve("fc2", now + 1e-3, wrong, shifted, has_bias=True)
    assert coefficients is None
    assert report.action == "kept"
    assert report.error_after == report.error_before


def test_layers_without_enough_rows_or_with_nan_are_skipped_with_a_warning() -> None:
    now, held = torch.zeros(7, 3).double(), moments(*problem(50, 1))
    few, coefficients = solve("fc2", now, moments(*problem(6, 0)), held, has_bias=True)
    assert coefficients is None
    assert few.action == "skipped"
    assert "6 rows" in few.warning
    x, y = problem(50, 0)
    broken, coefficients = solve("fc2", now, moments(x * torch.nan, y), held, has_bias=True)
    assert coefficients is None
    assert "not finite" in broken.warning


def test_equal_inputs_do_not_break_the_solution() -> None:
    x, y = problem(200, 0)
    twice = torch.cat([x, x], dim=1)
    report, coefficients = solve(
        "fc2", torch.zeros(13, 3).double(), moments(twice, y), moments(twice, y), has_bias=True
    )
    assert coefficients is not None
    assert coefficients.abs().max() < 100
    assert report.condition < 1e10
    assert report.error_after < 1e-6


def test_observe_sees_both_sides_and_stops() -> None:
    first, second, third = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6)
    calls = []
    third.register_forward_hook(lambda *_: calls.append(1))
    run, start = nn.Sequential(first, second, third), torch.randn(2, 3)
    entered, left = observe(run, start, [(first, "input"), (second, "output")])
    torch.testing.assert_close(entered, start)
    torch.testing.assert_close(left, second(first(start)))
    assert not calls
    assert not first._forward_pre_hooks
    assert not second._forward_hooks


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.Conv2d(6, 5, 2, 2)])
def test_rows_turn_a_layer_into_a_matrix_product(layer: nn.Linear | nn.Conv2d) -> None:
    x = torch.randn(2, 4, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
    assert layer.bias is not None
    product = input_rows(layer, x) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(product, output_rows(layer, layer(x)))


def test_layers_are_found_in_running_order() -> None:
    model = timm.create_model("pvt_v2_b0", num_classes=3).eval()
    block = next(segment for segment in segments_of(model) if segment.name == "stages.0.blocks.0")
    names = linear_layers(model, block.run, torch.randn(1, 8, 8, 32))
    assert [name.removeprefix("stages.0.blocks.0.") for name in names] == [
        "attn.q",
        "attn.sr",
        "attn.kv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    ]  # no depthwise convolution


def test_every_fifth_image_is_held_out() -> None:
    fit, held = split(torch.arange(11))
    assert fit.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert held.tolist() == [4, 9]


def test_a_changed_layer_is_repaired_by_those_that_write_the_stream() -> None:
    """An error in one block's attention is gone after the stream was refitted, not only not made larger."""
    torch.manual_seed(0)
    dense = timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    dense.eval()
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.blocks[0].attn.proj.weight.mul_(0.2)
        broken.blocks[0].mlp.fc2.weight.mul_(0.2)
    images = torch.randn(100, 3, 32, 32)
    before = (broken(images) - dense(images)).square().mean()
    width = next(group.size for group in groups_of(dense) if group.kind == "embed")
    streams = {f"blocks.{i}.{part}": torch.eye(width).double() for i in (0, 1) for part in ("attn.proj", "mlp.fc2")}
    reports = refit(broken, dense, images, Targets({}, streams, {}))
    assert [report.layer for report in reports] == ["blocks.0.attn.proj", "blocks.0.mlp.fc2", *list(streams)[2:]]
    assert (broken(images) - dense(images)).square().mean() < 1e-6 * before
