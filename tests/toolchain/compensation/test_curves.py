"""Losses of a cut whose other units are refitted, against brute force."""

import itertools

import pytest
import timm
import torch
from torch import Tensor

from upvits.calib_data.errors import UserError
from upvits.toolchain.compensation import compensated_curves
from upvits.toolchain.compensation.curves import LayerStatistics, surgeon
from upvits.toolchain.compensation.statistics import add_gram
from upvits.toolchain.families import groups_of


def layer(x: Tensor, outputs: int) -> LayerStatistics:
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    return LayerStatistics(x.T @ x / len(x), torch.eye(outputs).double())


def refitted_loss(x: Tensor, weight: Tensor, removed: list[int]) -> float:
    """1/2 mean squared error of the outputs when `removed` are gone and the rest is fitted anew; Fisher I / outputs."""
    x, target = torch.cat([x, torch.ones(len(x), 1)], dim=1).double(), x.double() @ weight.double().T
    kept = [index for index in range(x.shape[1]) if index not in removed]
    solution = torch.linalg.lstsq(x[:, kept], target).solution
    gap = x[:, kept] @ solution - target
    return float(gap.square().sum() / len(x) / len(weight) / 2)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_losses_are_those_of_a_real_refit(num_heads: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8) @ torch.randn(8, 8) + 2
    weight = torch.randn(5, 8)
    curve = surgeon(weight, layer(x, 5), num_heads)
    assert sorted(curve.order.tolist()) == list(range(8))
    assert curve.loss[0] == 0
    for removed in range(1, 9):
        expected = refitted_loss(x, weight, curve.order[:removed].tolist())
        # 1e-4 of the mean diagonal is added to the second moments
        assert float(curve.loss[removed]) == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_the_first_unit_to_leave_is_the_best_and_the_second_knows_of_it() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(300, 6) @ torch.randn(6, 6), torch.randn(4, 6)
    order = surgeon(weight, layer(x, 4)).order.tolist()
    losses = {unit: refitted_loss(x, weight, [unit]) for unit in range(6)}
    assert order[0] == min(losses, key=losses.__getitem__)
    pairs = {unit: refitted_loss(x, weight, [order[0], unit]) for unit in range(6) if unit != order[0]}
    assert order[1] == min(pairs, key=pairs.__getitem__)


def test_of_two_equal_units_one_is_free_and_the_other_is_not() -> None:
    torch.manual_seed(0)
    half = torch.randn(500, 64)
    x = torch.cat([half, half], dim=1)  # units j and j + 64 are the same
    curve = surgeon(torch.randn(16, 128), layer(x, 16))
    assert sorted(unit % 64 for unit in curve.order[:64].tolist()) == list(range(64))
    assert curve.loss[64] < 0.01 * curve.loss[128]
    assert curve.loss[72] > 0.05 * curve.loss[128]


def test_heads_lose_dims_in_turns() -> None:
    torch.manual_seed(0)
    curve = surgeon(torch.randn(4, 12), layer(torch.randn(100, 12), 4), num_heads=3)
    for removed in (3, 6, 9):
        heads = [unit // 4 for unit in curve.order[:removed].tolist()]
        assert [heads.count(head) for head in range(3)] == [removed // 3] * 3


def test_a_given_order_is_kept() -> None:
    torch.manual_seed(0)
    x, weight, order = torch.randn(100, 6), torch.randn(4, 6), torch.tensor([5, 0, 3, 1, 4, 2])
    curve = surgeon(weight, layer(x, 4), order=order)
    assert curve.order.tolist() == order.tolist()
    assert float(curve.loss[3]) == pytest.approx(refitted_loss(x, weight, [5, 0, 3]), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0"])
def test_every_group_gets_a_curve_that_starts_at_zero_and_never_falls(name: str) -> None:
    torch.manual_seed(0)
    small = (
        {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
        if "deit" in name
        else {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}
    )
    model = timm.create_model(name, num_classes=4, **small).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    side = 32 if "deit" in name else 64
    curves = compensated_curves(model, torch.randn(20, 3, side, side), batch_size=10)
    sizes = {group.name: group.size for group in groups_of(model) if group.kind in ("ffn", "attention", "qk", "v")}
    sizes |= {group.name: group.size for group in groups_of(model) if group.kind == "embed"}
    assert {key: len(curve.order) for key, curve in curves.items()} == sizes
    for curve in curves.values():
        assert len(curve.loss) == len(curve.order) + 1
        assert curve.loss[0] == 0
        assert curve.loss[-1] > 0
        assert all(a <= b for a, b in itertools.pairwise(curve.loss.tolist()))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_units_of_the_last_block_are_not_free_because_images_are_few() -> None:
    """The output depends on one token per image there: fewer than units, which would explain each other by chance."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=24, depth=1, num_heads=3, num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    images = torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    few, many = (compensated_curves(model.eval(), images[:n], rotate=False)["blocks.0.mlp"] for n in (24, 200))
    assert float(few.loss[48]) > 0.25 * float(many.loss[48])


def test_too_few_images_are_refused() -> None:
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=4).eval()
    with pytest.raises(UserError, match="2 calibration images are too few"):
        compensated_curves(model, torch.randn(2, 3, 32, 32))


def test_fewer_rows_than_units_and_units_that_are_alike_give_a_curve() -> None:
    """Moments in fp32, which rounding leaves not quite positive: ten equal tokens for 600 units far from zero."""
    rows = 5 + torch.randn(10, 600, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows.repeat_interleave(2, dim=1), torch.ones(10, 1)], dim=1)
    second = torch.zeros(1201, 1201)
    add_gram(second, rows)
    curve = surgeon(torch.randn(8, 1200), LayerStatistics(second, torch.eye(8)))
    assert sorted(curve.order.tolist()) == list(range(1200))
    assert curve.loss.isfinite().all()
    assert (curve.loss.diff() >= 0).all()


def test_moments_that_are_not_finite_are_refused() -> None:
    second = torch.full((5, 5), torch.nan)
    with pytest.raises(UserError, match="not finite"):
        surgeon(torch.ones(2, 4), LayerStatistics(second, torch.eye(2)))


def test_a_symmetric_product_in_parts_is_the_product() -> None:
    rows = torch.randn(7, 600, dtype=torch.float64)
    sums = torch.ones(600, 600, dtype=torch.float64)
    add_gram(sums, rows, 2.0)
    torch.testing.assert_close(sums, 1 + 2 * rows.T @ rows)
