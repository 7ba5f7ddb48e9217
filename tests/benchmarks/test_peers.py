"""A peer's recorded choice becomes a network of this project; its environment is not needed here."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks import peers
from upvits import toolchain
from upvits.calib_data.errors import BuildError, UserError
from upvits.toolchain.families import groups_of
from upvits.toolchain.planning.document import sizer
from upvits.toolchain.structure.groups import widths_of

# What Torch-Pruning 1.6.1 (magnitude) removed from the network below at ratio 0.25: heads lose the same dims.
REMOVED = {"embed": [1, 6, 8, 13], "blocks.0.attn": [0, 2, 8, 10], "blocks.0.mlp": list(range(0, 32, 4))}


@pytest.fixture
def dense() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, mlp_ratio=2, num_classes=3
    )
    return model.eval()


def test_choice_is_cut_as_the_peer_cuts_it_and_keeps_the_softmax_scale(dense: nn.Module) -> None:
    small = toolchain.delete_units(dense, peers.as_plan(dense, REMOVED, "peer"))
    kept = [unit for unit in range(16) if unit not in REMOVED["embed"]]
    state, new = dense.state_dict(), small.state_dict()
    assert torch.equal(new["norm.weight"], state["norm.weight"][kept])
    dims = [unit for unit in range(16) if unit not in REMOVED["blocks.0.attn"]]
    rows = torch.tensor([part * 16 + dim for part in range(3) for dim in dims])
    wanted = state["blocks.0.attn.qkv.weight"][rows][:, kept]
    torch.testing.assert_close(new["blocks.0.attn.qkv.weight"][12:], wanted[12:], rtol=0, atol=0)
    # 8 dims a head become 6: timm divides by sqrt(6), the dense network by sqrt(8)
    torch.testing.assert_close(new["blocks.0.attn.qkv.weight"][:12], wanted[:12] * (6 / 8) ** 0.5)


def test_plan_counts_the_result(dense: nn.Module) -> None:
    plan = peers.as_plan(dense, REMOVED, "peer")
    small = toolchain.delete_units(dense, plan)
    assert plan.after.macs == toolchain.count_macs(small, (3, 32, 32)) < plan.before.macs
    assert plan.after.params == toolchain.count_params(small)


@pytest.mark.parametrize("removed", [{"embed": list(range(16))}, {"blocks.7.mlp": [0]}, {"embed": [16]}])
def test_impossible_choice_is_refused(dense: nn.Module, removed: dict[str, list[int]]) -> None:
    with pytest.raises(UserError, match="cannot lose"):
        peers.as_plan(dense, removed, "peer")


def test_ratio_reaches_the_macs_and_not_much_less(dense: nn.Module) -> None:
    ratio = peers.ratio_for(dense, 0.5)
    groups = groups_of(dense)
    widths = [peers._widths(groups, value) for value in (ratio, ratio - 2 / 1024)]
    size = sizer(dense, None)
    half = size(widths_of(groups)).macs / 2
    assert size(widths[0]).macs <= half < size(widths[1]).macs


def test_nearest_is_the_largest_that_fits(dense: nn.Module) -> None:
    grid = [peers.Choice(0.1 * n, {"blocks.0.mlp": list(range(8 * n))}) for n in (1, 2, 3)]
    macs = [peers.as_plan(dense, c.removed, "peer").after.macs for c in grid]
    whole = peers.as_plan(dense, {}, "peer").before.macs
    assert peers.nearest(dense, grid, (macs[1] + 1) / whole) is grid[1]
    assert peers.nearest(dense, grid, 0.01) is grid[2]  # none fits: the smallest


def fake_environment(folder: Path, body: str) -> Path:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


def test_job_reaches_the_process_and_its_answer_comes_back(dense: nn.Module, tmp_path: Path) -> None:
    answer = {"seconds": 1.5, "grid": [{"ratio": 0.25, "removed": REMOVED}]}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    python = fake_environment(tmp_path, f'cp "$2/job.json" {tmp_path}; cp {tmp_path}/answer.json "$2/kept.json"')
    images, labels = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])
    found, seconds = peers.plans(python, dense, images, labels, "Isomorphic Pruning, Taylor", [0.5], seed=7)
    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["criterion"], job["isomorphic"], job["seed"]) == ("taylor", True, 7)
    assert len(job["ratios"]) == len(peers.OFFSETS)
    assert min(abs(ratio - peers.ratio_for(dense, 0.5)) for ratio in job["ratios"]) < 1e-4
    assert found[0.5].keep["embed"] == tuple(unit for unit in range(16) if unit not in REMOVED["embed"])
    assert seconds == 1.5


def test_failure_of_the_peer_is_told_in_its_own_words(dense: nn.Module, tmp_path: Path) -> None:
    python = fake_environment(tmp_path, 'echo "RuntimeError: shape is invalid" >&2; exit 1')
    with pytest.raises(BuildError, match="shape is invalid"):
        peers.choices(python, dense, torch.zeros(1, 3, 32, 32), torch.tensor([0]), peers.Peer("magnitude"), [0.5], 0)


def test_missing_environment_is_a_users_error(dense: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no environment"):
        peers.choices(
            tmp_path / "none", dense, torch.zeros(1, 3, 32, 32), torch.tensor([0]), peers.Peer("magnitude"), [0.5], 0
        )
