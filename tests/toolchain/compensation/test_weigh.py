"""How much stream widths count is decided by what compressed networks really lose."""

from collections.abc import Mapping

import pytest
import torch

from tests.contracts.variants import VARIANTS, make, pictures
from upvits import toolchain
from upvits.toolchain.compensation import compensated_curves, compress, weigh_streams, with_joint_units
from upvits.toolchain.compensation import weigh as weighing
from upvits.toolchain.planning import Curve, PruningPlan, plan_by_scores
from upvits.toolchain.scores import divergence

WEIGHTS = (1.0, 1e-3, 1e-6)


def test_the_weight_whose_network_is_closest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = VARIANTS[0]
    model, images = make(variant), pictures(variant, 64)
    curves = compensated_curves(model, images)
    scores = toolchain.score(model, images, method="fisher")

    def plan_by(own: Mapping[str, Curve]) -> PruningPlan:
        return plan_by_scores(model, scores, target_macs=0.6, planner="global", align=1, curves=own)

    found = weigh_streams(model, images, curves, plan_by, weights=WEIGHTS)
    losses = {}
    for weight in WEIGHTS:
        own = {name: Curve(c.order, c.loss * (weight if name == "embed" else 1)) for name, c in curves.items()}
        network = compress(model, with_joint_units(plan_by(own), curves), images[::2]).model
        with torch.inference_mode():
            losses[weight] = float(divergence(model(images[1::2]), network(images[1::2])).mean())
    best = min(losses, key=lambda weight: losses[weight])
    assert len(set(losses.values())) > 1, "all weights gave the same network: nothing was tested"
    assert torch.equal(found["embed"].loss, curves["embed"].loss * best)
    others = [name for name in curves if name != "embed"]
    assert all(torch.equal(found[name].loss, curves[name].loss) for name in others)

    # nothing is compressed where the stream stays whole
    monkeypatch.setattr(weighing, "compress", lambda *_, **__: pytest.fail("there is nothing to try"))

    def without_stream(own: Mapping[str, Curve]) -> PruningPlan:
        return plan_by_scores(
            model, scores, target_macs=0.8, planner="global", align=1, curves=own, components=("attention", "ffn")
        )

    kept = weigh_streams(model, images, curves, without_stream, weights=WEIGHTS)
    assert torch.equal(kept["embed"].loss, curves["embed"].loss)
