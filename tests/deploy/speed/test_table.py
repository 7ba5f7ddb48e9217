"""The latency table: measured once, kept, continued, and additive."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.deploy.conftest import preprocess_for
from upvits.calib_data.cache import cache_folder
from upvits.calib_data.errors import UserError
from upvits.deploy.runtimes import RUNTIMES, Session
from upvits.deploy.speed import table as tables
from upvits.deploy.speed.chains import Chain, chain, grid, stages_of, without_blocks
from upvits.deploy.speed.deployment import Baseline, Deployment, opened, with_random_weights
from upvits.deploy.speed.table import LatencyCosts, Point, costs_from, measure_table, predicted
from upvits.toolchain.planning import count_costs

PREPROCESS = preprocess_for(32)
DEPLOYMENT = Deployment(RUNTIMES["onnxruntime"], "fp32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPVITS_DEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3)
    return model.eval()


@pytest.fixture(scope="module")
def pyramid() -> nn.Module:
    widths = {"depths": (2, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)}
    model: nn.Module = timm.create_model("pvt_v2_b0", num_classes=7, **widths)
    return model.eval()


@pytest.fixture(scope="module")
def dense(small: nn.Module) -> Iterator[Session]:
    with opened(DEPLOYMENT, {"dense": (small, PREPROCESS)}) as sessions:
        yield sessions["dense"]


def linear_costs(model: nn.Module, size: tuple[int, int, int], dense_ms: float = 8.0, noise: str = "") -> LatencyCosts:
    """Costs from made-up points: a branch takes dim * width, a call 1, the rest its MACs; `noise` is far too slow."""
    stages, points = stages_of(model, size), {}
    for dims in tables.fixed_dims(stages, 8):
        points[tables._fixed_name(dims)] = 1e-9 * count_costs(model, "MACs", size).fixed(dims)
    for stage in stages:
        points[tables._call_name(stage)] = 1e-3
        for part in ("attn", "mlp"):
            heights, widths = tables.branch_grid(stage, part, 8)
            for d in heights:
                for w in widths:
                    points[tables._branch_name(stage, part, d, w)] = 1e-3 + 1e-6 * d * w
    if noise:
        points[noise] = 1.0
    shares = {name: Point(share=value, low=value, high=value) for name, value in points.items()}
    return costs_from(shares, model, size, dense_ms, 8)


@pytest.mark.parametrize("name", ["small", "pyramid"])
def test_the_parts_of_the_dense_network_add_up_to_its_time(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    costs = linear_costs(model, (3, 32, 32) if name == "small" else (3, 64, 64))
    assert predicted(costs, model) == pytest.approx(8.0)


def test_costs_between_points_are_linear_and_scale_with_the_dense_network(small: nn.Module) -> None:
    costs = linear_costs(small, (3, 32, 32))
    whole = costs.branch("blocks.0.mlp", 48, (192, 0))
    assert costs.branch("blocks.1.mlp", 48, (120, 0)) == pytest.approx(whole * 120 / 192)
    assert costs.branch("blocks.1.mlp", 32, (192, 0)) == pytest.approx(whole * 32 / 48)
    assert costs.branch("blocks.1.mlp", 32, (120, 0)) == pytest.approx(whole * 32 / 48 * 120 / 192)
    both, queries = (costs.branch("blocks.0.attn", 48, own) for own in ((48, 48), (24, 48)))
    assert queries == pytest.approx(0.75 * both)
    slower = linear_costs(small, (3, 32, 32), 16.0)
    assert slower.branch("blocks.0.mlp", 24, (96, 0)) == pytest.approx(2 * costs.branch("blocks.0.mlp", 24, (96, 0)))
    assert costs.fixed({"embed": 24}) < costs.fixed({"embed": 40}) < costs.fixed({"embed": 48})


def test_noise_does_not_make_narrow_branches_dearer(small: nn.Module) -> None:
    (stage,) = stages_of(small, (3, 32, 32))
    narrow = tables._branch_name(stage, "mlp", 48, tables.branch_grid(stage, "mlp", 8)[1][0])
    noisy = linear_costs(small, (3, 32, 32), noise=narrow)
    assert noisy.branch("blocks.0.mlp", 48, (48, 0)) <= noisy.branch("blocks.0.mlp", 48, (192, 0))


@pytest.mark.slow
def test_a_table_is_measured_once_and_continued(
    small: nn.Module, dense: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[set[str]] = []
    real = opened

    def counting(deployment: Deployment, networks: dict[str, object], threads: int | None) -> object:
        built.append(set(networks))
        return real(deployment, networks, threads)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "opened", counting)
    for name, few in (("_DIM_SHARES", (1.0,)), ("_WIDTH_SHARES", (1.0, 0.5)), ("_FIXED_SHARES", (1.0,))):
        monkeypatch.setattr(tables, name, few)
    costs = measure_table(Baseline(small, PREPROCESS, DEPLOYMENT, dense, 2.0))
    files = list(cache_folder().rglob("*.json"))
    assert len(files) == 1
    assert set().union(*built) == set(costs.points)
    assert sum(map(len, built)) == len(costs.points)
    assert all(point.low <= point.share <= point.high for point in costs.points.values())
    assert 0 < costs.branch("blocks.0.mlp", 48, (96, 0)) <= costs.branch("blocks.0.mlp", 48, (192, 0)) < 2.0

    built.clear()
    assert measure_table(Baseline(small, PREPROCESS, DEPLOYMENT, dense, 2.0)).points == costs.points
    assert built == []
    # another process was killed before the last point
    document = json.loads(files[0].read_text())
    lost = next(name for name in document["points"] if " mlp " in name)
    del document["points"][lost]
    files[0].write_text(json.dumps(document))
    assert set(measure_table(Baseline(small, PREPROCESS, DEPLOYMENT, dense, 2.0)).points) == set(costs.points)
    assert built == [{lost}]
    files[0].write_text("{ broken")
    assert tables._load(small, PREPROCESS, DEPLOYMENT)[1].points == {}


def test_a_cache_that_cannot_be_written_is_told(
    small: nn.Module, dense: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UPVITS_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="UPVITS_DEPLOY_CACHE"):
        measure_table(Baseline(small, PREPROCESS, DEPLOYMENT, dense, 2.0))


def test_stages_know_their_streams(small: nn.Module, pyramid: nn.Module) -> None:
    (only,) = stages_of(small, (3, 32, 32))
    assert (only.blocks, only.count, only.embed, only.size, only.on_map) == ("blocks", 2, "embed", (1, 5, 48), False)
    first, *_, last = stages_of(pyramid, (3, 64, 64))
    assert (first.blocks, first.count, first.size, first.on_map) == ("stages.0.blocks", 2, (16, 16, 16), True)
    assert (last.size, last.heads, last.widths["attn"]) == ((2, 2, 64), 8, 64)


@pytest.mark.parametrize("name", ["small", "pyramid"])
def test_both_branches_in_turn_are_the_block(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    size = (3, 32, 32) if name == "small" else (3, 64, 64)
    stage = stages_of(model, size)[-1]
    block = model.get_submodule(f"{stage.blocks}.0")
    stream = torch.randn(2, *stage.size)
    with torch.no_grad():
        tokens = stream.flatten(1, 2)
        wanted = block(tokens, list(stage.size[:2])) if stage.on_map else block(tokens)
        between = Chain([block], "attn", stage.on_map)(stream).reshape(stream.shape)
        torch.testing.assert_close(Chain([block], "mlp", stage.on_map)(between), wanted)


def test_chains_have_the_widths_that_were_asked_for(pyramid: nn.Module) -> None:
    stage = stages_of(pyramid, (3, 64, 64))[1]
    made = chain(pyramid, stage, "attn", 16, 16, 3)
    blocks: list[Any] = list(made.get_submodule("blocks").children())
    assert len(blocks) == 3
    assert all(tuple(block.attn.q.weight.shape) == (16, 16) for block in blocks)
    assert made(torch.randn(2, 8, 8, 16)).shape == (2, 64, 16)
    assert not torch.equal(blocks[0].attn.q.weight, blocks[1].attn.q.weight)


def test_the_network_without_blocks_runs(pyramid: nn.Module) -> None:
    bare = with_random_weights(without_blocks(pyramid, {"stages.0": 8}))
    assert torch.isfinite(bare(torch.randn(1, 3, 64, 64))).all()
    assert not [name for name, _ in bare.named_parameters() if ".blocks." in name]
    assert bare.get_submodule("patch_embed.proj").out_channels == 8


def test_grids_are_aligned_and_end_at_the_whole() -> None:
    assert grid(100, (1.0, 0.5, 0.25), 8) == (24, 48, 100)
    assert grid(8, (1.0, 0.5, 0.25), 8) == (8,)
    assert np.all(np.array(grid(768, (1.0, 0.5, 0.25), 32)) % 32 == 0)
