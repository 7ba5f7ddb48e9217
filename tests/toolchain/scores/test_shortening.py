"""Depth scores: greedy removal of blocks, by the joint KL of the network that is left."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from upvits.toolchain.networks.depth import all_blocks, shorten, shorter
from upvits.toolchain.scores import divergence
from upvits.toolchain.scores.divergence import output_scale
from upvits.toolchain.scores.shortening import depth_paths


def networks() -> dict[str, tuple[nn.Module, int]]:
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=48, depth=4, num_classes=5)
    widths = {"embed_dims": (16, 32, 40, 64), "depths": (1, 2, 3, 1), "mlp_ratios": (2, 2, 2, 2)}
    return {"vit": (vit.eval(), 32), "pvt": (timm.create_model("pvt_v2_b2", num_classes=0, **widths).eval(), 64)}


@pytest.mark.parametrize("name", ["vit", "pvt"])
def test_every_step_is_the_best_shorter_network(name: str) -> None:
    model, size = networks()[name]
    images = torch.randn(5, 3, size, size)
    batches = torch.split(images, 3)
    scale = output_scale(model, batches)
    paths = depth_paths(model, batches, scale, quiet=True)
    assert list(paths) == list(all_blocks(model))
    with torch.inference_mode():
        dense = model(images)
        for blocks, path in paths.items():
            pairs = all_blocks(model)[blocks]
            assert len(path.steps) == len(path.loss) == len(pairs) - 1
            for step, loss in zip(path.steps, path.loss, strict=True):
                losses = {
                    other: float(divergence(dense, shorten(model, {blocks: other})(images), scale).mean())
                    for other in shorter(pairs)
                }
                assert step == min(losses, key=lambda other: losses[other])
                assert loss == pytest.approx(losses[step], rel=1e-3, abs=1e-10)
                pairs = step
