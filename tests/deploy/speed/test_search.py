"""A latency target is met by the network that was built and timed, or nothing is claimed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from tests.deploy.conftest import preprocess_for
from tests.deploy.speed.planner import uniform_planner
from upvits import toolchain
from upvits.calib_data.errors import TargetError, UserError
from upvits.deploy.recipe.document import make_recipe
from upvits.deploy.recipe.engines import deployment_of, engines_of
from upvits.deploy.runtimes import RUNTIMES, BatchProfile
from upvits.deploy.runtimes.onnxruntime_ import CPU
from upvits.deploy.speed import search as searching
from upvits.deploy.speed import table as tables
from upvits.deploy.speed.deployment import Deployment, check_deployment, measure, opened
from upvits.deploy.speed.search import ALLOWED, search
from upvits.deploy.speed.target import parse_speedup, parse_target
from upvits.toolchain.compensation import compensated_curves
from upvits.toolchain.planning import Costs, PruningPlan, plan_within

BATCH = 4
DEPLOYMENT = Deployment(RUNTIMES["onnxruntime"], "fp32", BATCH, BatchProfile(1, BATCH, BATCH))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One small table for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, few in (("_DIM_SHARES", (1.0,)), ("_WIDTH_SHARES", (1.0, 0.5)), ("_FIXED_SHARES", (1.0, 0.5))):
            patch.setattr(tables, name, few)
        patch.setenv("UPVITS_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def small() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3, num_classes=7
    )
    return model.eval()


@pytest.mark.slow
def test_an_easy_speedup_is_met_by_what_was_built(small: nn.Module) -> None:
    found = search(small, preprocess_for(64), uniform_planner(small), DEPLOYMENT, parse_speedup("1.3x"))
    chosen = found.record.chosen
    assert chosen.over_target <= ALLOWED
    assert chosen.speedup >= 1.3 / ALLOWED
    assert chosen in found.record.attempts
    assert chosen.macs_share == found.plan.after.macs / found.plan.before.macs < 1
    # measured again, apart from the search; the machine may be busy, but a network that was not cut is never this fast
    pruned = toolchain.delete_units(small, found.plan)
    networks = {"dense": (small, preprocess_for(64)), "pruned": (pruned, preprocess_for(64))}
    with opened(DEPLOYMENT, networks) as sessions:
        report = measure(sessions, dict.fromkeys(sessions, (3, 64, 64)), DEPLOYMENT)
    assert report.ratio("dense", "pruned", BATCH).median > 1.1


def test_an_impossible_speedup_ends_with_the_nearest_and_the_floor(small: nn.Module) -> None:
    with pytest.raises(TargetError) as caught:
        search(small, preprocess_for(64), uniform_planner(small), DEPLOYMENT, parse_speedup("500x"))
    assert caught.value.exit_code == 6
    assert "500x was not reached on onnxruntime fp32 at batch 4" in caught.value.what
    assert "x faster than the dense network's" in caught.value.why
    assert "Alignment is the floor." in caught.value.why


def test_the_floor_of_measured_curves_ends_the_search_too(small: nn.Module) -> None:
    """Streams are measured down to a quarter of their width: below it their curves say infinity."""
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores, curves = toolchain.score(small, images[:8]), compensated_curves(small, images)
    assert torch.isinf(curves["embed"].loss).any()

    def planner(costs: Costs, budget: float) -> PruningPlan:
        return plan_within(small, scores, costs, budget, components=("embed", "ffn"), curves=curves)

    with pytest.raises(TargetError, match="500x was not reached") as caught:
        search(small, preprocess_for(64), planner, DEPLOYMENT, parse_speedup("500x"))
    assert "By the latency table" in caught.value.why


def test_a_target_that_the_dense_network_meets_is_no_target(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "measure_table", lambda *_, **__: pytest.fail("nothing is to be measured"))
    with pytest.raises(UserError, match="meets 1e\\+06 ms as it is"):
        search(small, preprocess_for(64), uniform_planner(small), DEPLOYMENT, parse_target("1000000ms"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"precision": "fp8"}, "onnxruntime has no fp8"),
        ({"batch": 9}, "Latency is wanted at batch 9, but engines are built for 1 to 4"),
    ],
)
def test_what_cannot_be_timed_is_refused_at_once(change: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_deployment(replace(DEPLOYMENT, **change))  # type: ignore[arg-type]


def test_a_runtime_that_cannot_run_here_is_refused_at_once() -> None:
    absent = [runtime for runtime in RUNTIMES.values() if runtime.missing_to_run() is not None]
    if not absent:
        pytest.skip("every runtime runs here")
    with pytest.raises(UserError, match=f"A latency target for {absent[0].name} cannot be met here") as caught:
        check_deployment(Deployment(absent[0], absent[0].precisions[0]))
    assert absent[0].missing_to_run().why in caught.value.why  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "ms"), [("2.0ms", 2.0), (" .5 ms ", 0.5), ("13ms", 13.0)])
def test_a_latency_is_read(text: str, ms: float) -> None:
    assert parse_target(text).ms_of(100) == ms


@pytest.mark.parametrize("text", ["2", "2s", "0ms", "-1ms", "nanms", "", "1e-3ms", "infms"])
def test_what_is_no_latency_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not valid"):
        parse_target(text)


@pytest.mark.parametrize(("text", "ms"), [("2x", 50.0), ("1.25", 80.0)])
def test_a_speedup_is_read(text: str, ms: float) -> None:
    assert parse_speedup(text).ms_of(100) == ms


@pytest.mark.parametrize("text", ["1x", "0.5x", "x", "2ms", "-3x", "inf", "nan"])
def test_what_is_no_speedup_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not valid"):
        parse_speedup(text)


def test_a_target_is_measured_where_its_precision_is() -> None:
    recipe = make_recipe({"model": "pvt_v2_b0", "plan": {"speedup": "2x"}, "engine": {"precision": "bf16"}})
    here = replace(CPU, name="has-bf16", precisions=("fp32", "bf16"))
    found = deployment_of(recipe, engines_of(recipe, [RUNTIMES["onnxruntime"], here]))
    assert (found.runtime.name, found.precision) == ("has-bf16", "bf16")
