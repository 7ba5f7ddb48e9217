"""Pruned networks of every family compute the same as ONNX, at every batch size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits import toolchain
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.measure.parity import check_parity, model_outputs, session_outputs
from upvits.deploy.runtimes import open_onnx
from upvits.toolchain.planning import Component

ALL: tuple[Component, ...] = ("embed", "attention", "ffn")
UNEVEN: tuple[Component, ...] = ("qk_v",)  # and q·k dims other than v dims
NOT_STOCK: tuple[Component, ...] = ("attention", "ffn")  # heads no longer fill the embedding
BY_NAME = {variant.architecture: variant for variant in VARIANTS}


@pytest.mark.parametrize(
    ("architecture", "components"),
    [
        ("deit_tiny_patch16_224", NOT_STOCK),
        ("deit_tiny_distilled_patch16_224", ALL),
        ("vit_small_patch14_reg4_dinov2", ALL),
        ("vit_base_patch16_gap_224", ALL),
        ("pvt_v2_b0", ALL),
        ("pvt_v2_b0", NOT_STOCK),
        ("pvt_v2_b2_li", NOT_STOCK),
        ("deit3_small_patch16_224", UNEVEN),
        ("pvt_v2_b0", UNEVEN),
    ],
)
def test_pruned_networks_export(architecture: str, components: tuple[Component, ...], tmp_path: Path) -> None:
    variant: Variant = BY_NAME[architecture]
    model, images = make(variant), pictures(variant, 5)
    scores = toolchain.score(model, method="random")
    plan = toolchain.plan(model, scores, ratio=0.5, align=4, components=components)
    if components == UNEVEN:
        plan = replace(plan, keep={name: units for name, units in plan.keep.items() if not name.endswith(".v")})
    pruned = toolchain.delete_units(model, plan)
    report = export_onnx(pruned, tmp_path / "model.onnx", toolchain.preprocess_of(pruned))
    with open_onnx(tmp_path / "model.onnx", threads=1) as session:
        for size in (1, 5):
            outputs = session_outputs(session, torch.split(images, size))
            parity = check_parity(model_outputs(pruned, [images]), outputs)
            assert parity.max_relative < 1e-5
    assert report.outputs[0].startswith("features" if variant.args["num_classes"] == 0 else "logits")
    assert report.rewritten_ffns == (4 if variant.family == "pvt_v2" else 0)
