"""The benchmark of realised speed: its arithmetic, and a real small measurement."""

import io

import pytest
import timm
import torch
from rich.console import Console

from benchmarks.realised_speed import WAYS, Cut, Network, gains, measure_network, runtimes_here, table
from upvits import toolchain
from upvits.deploy.runtimes import RUNTIMES
from upvits.toolchain.planning import Size
from upvits.toolchain.surgery.deletion import delete_units


def test_gains_are_dense_over_pruned() -> None:
    found = gains(Size(100, 10), Size(50, 5), 1.5)
    assert found == {"macs_gain": 2.0, "speedup": 1.5, "realised": 0.75}


def test_only_runtimes_that_work_here_are_measured() -> None:
    found = runtimes_here()
    assert "onnxruntime" in found
    assert all(RUNTIMES[name].missing_to_run() is None for name in found)


def test_the_ways_cover_planners_alignment_and_depth() -> None:
    assert len({(way.planner, way.align, way.depth) for way in WAYS}) == len(WAYS) == 6
    assert {way.planner for way in WAYS if way.depth} == {"uniform", "global"}
    assert {way.planner for way in WAYS if way.align == 1} == {"uniform", "global"}


def test_a_cut_network_is_timed_in_turns_with_the_dense_one() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3).eval()
    chosen = toolchain.plan(model, toolchain.score(model, method="magnitude"), ratio=0.5)
    network = Network("tiny", model, torch.zeros(0))
    (row,) = measure_network(network, [Cut(WAYS[0], 0.3, delete_units(model, chosen), chosen)], "onnxruntime", 4, 0.3)
    assert row["macs_share"] == pytest.approx(1 / row["macs_gain"])
    assert row["realised"] == pytest.approx(row["speedup"] / row["macs_gain"])
    assert row["low"] <= row["speedup"] <= row["high"]
    assert row["speedup"] > 1.1  # a third of the arithmetic, in turns with the dense network
    printed = Console(file=io.StringIO(), width=120, record=True)
    printed.print(table([row]))
    assert f"{row['realised']:.2f}" in printed.export_text()
