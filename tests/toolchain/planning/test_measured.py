"""Joint losses: what they are at the measured points, and what they change."""

from __future__ import annotations

import torch

import toolchain
from tests.contracts.variants import VARIANTS, make, pictures
from toolchain.families import groups_of
from toolchain.masks import masked
from toolchain.planning.measured import measured_curves, through_points
from toolchain.scores import divergence

DEIT = VARIANTS[0]


def test_a_curve_goes_through_its_points_in_the_given_shape() -> None:
    shape = torch.tensor([0, 1, 3, 4, 8, 9], dtype=torch.float64)
    found = through_points(shape, [2, 4], [30.0, 40.0])
    assert found.tolist() == [0, 10, 30, 32, 40, 42]


def test_a_curve_never_falls_and_takes_flat_shapes() -> None:
    found = through_points(torch.zeros(5, dtype=torch.float64), [1, 2], [2.0, 1.0])
    assert found.tolist() == [0, 2, 2, 2, 2]


def test_curves_hold_the_joint_loss_of_the_first_units_to_leave() -> None:
    model, images = make(DEIT), pictures(DEIT, 6)
    scores = toolchain.score(model, method="random")
    curves = measured_curves(model, scores, images, components=("attention", "ffn"), shares=(0.5,), batch_size=4)
    assert set(curves) == {f"blocks.{index}.{part}" for index in range(2) for part in ("attn", "mlp")}
    for group in groups_of(model):
        if group.name in curves:
            curve = curves[group.name]
            mask = torch.ones(6, group.size)
            mask[:, curve.order[: group.size // 2]] = 0
            with torch.inference_mode(), masked(model, [group], {group.name: mask}):
                output = model(images)
            with torch.inference_mode():
                wanted = divergence(model(images), output).mean()
            torch.testing.assert_close(curve.loss[group.size // 2], wanted, rtol=1e-4, atol=1e-9)
    plan = toolchain.plan(
        model, scores, target_macs=0.7, planner="global", components=("attention", "ffn"), curves=curves
    )
    assert plan.after.macs <= 0.7 * plan.before.macs
