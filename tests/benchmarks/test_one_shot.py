"""The comparison of methods, on a tiny network and two images a class."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import one_shot, paper_claim, peers, record
from upvits import toolchain
from upvits.calib_data import open_data
from upvits.calib_data.errors import UserError
from upvits.toolchain.structure.timm_config import update_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: a DeiT of two narrow blocks for the demo set's classes."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, num_classes=12
    )
    update_config(model, input_size=(3, 32, 32))
    folder = tmp_path_factory.mktemp("tiny") / "model"
    toolchain.save(model.eval(), folder)
    return folder


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()


def test_one_shot_ends_stdout_with_rows_at_the_asked_macs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"fisher, uniform": one_shot.methods(True, None)["fisher, uniform"],
             "fisher, uniform, compensated": one_shot.methods(True, None)["fisher, uniform, compensated"]}  # fmt: skip

    def broken(task: one_shot.Task, share: float) -> one_shot.Made:
        raise UserError("does not fit")

    monkeypatch.setattr(one_shot, "methods", lambda quick, python: {**known, "broken": broken})
    monkeypatch.setattr(peers, "DEFAULT_PYTHON", tmp_path / "none")
    out = tmp_path / "out.json"
    arguments = ("--quick", "--json", "--model", "tiny", tiny, "demo", "--shares", 0.7, "--out", out,
                 "--score-images", 24, "--calib-images", 48, "--eval-images", 64, "--finetune-images", 32)  # fmt: skip
    run(one_shot, monkeypatch, *arguments)
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert document == json.loads(out.read_text())
    rows = {row["method"]: row for row in document["rows"]}
    assert set(rows) == {"dense", *known, "broken"}
    assert rows["dense"]["agreement"] == 100
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows["broken"]["failed"] == "does not fit"
    assert rows["broken"]["top1"] is None
    for name in known:
        assert 0.5 < rows[name]["macs_share"] <= 0.7
        assert rows[name]["kl"] > 0
        assert rows[name]["top1_after_finetune"] is not None
    assert len(document["verdicts"]) == 1
    # a run that was stopped: what it printed is not measured again
    (tmp_path / "rows").write_text(printed.err)
    monkeypatch.setattr(one_shot, "measure", lambda *_: pytest.fail("this row was there"))
    run(one_shot, monkeypatch, *arguments, "--rows", tmp_path / "rows")
    assert json.loads(out.read_text())["rows"] == document["rows"]


def row(method: str, top1: float, seed: int = 0) -> dict[str, Any]:
    return {"checkpoint": "vit", "level": 0.5, "method": method, "seed": seed, "top1": top1}


def test_verdict_names_the_winner_even_when_it_is_a_peer() -> None:
    peer = "Torch-Pruning, Taylor"
    lost = one_shot.verdicts([row("fisher, uniform", 50.0), row(peer, 60.0), row("dense", 90.0)])
    assert lost == [
        f"vit at 0.5 of the MACs: {peer} is first with 60.0 %; the best peer is {peer} with 60.0 %, ours has 50.0 %."
    ]
    won = one_shot.verdicts([row("fisher, uniform", 50.0), row("fisher, uniform", 90.0, 1), row(peer, 60.0)])
    assert "fisher, uniform is first with 70.0 %" in won[0]


def test_finetune_never_sees_validation_images(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = toolchain.load(tiny), open_data("demo")

    def refuse(index: int) -> Any:
        raise AssertionError("a validation image was read")

    guarded = replace(source, val=type(source.val)(source.val.labels, refuse))
    images = torch.zeros(2, 3, 32, 32)
    task = one_shot.Task("tiny", model, guarded, images, torch.zeros(2), 2, (images,), torch.zeros(2).long(),
                         one_shot.logits_of(model, (images,)), (0.5,), 0)  # fmt: skip
    assert one_shot.finetuned(task, model, 32, 1) is not None
    assert one_shot.finetuned(task, model, 0, 1) is None


def test_three_ways_have_the_same_shape_and_only_scratch_ignores_the_parent(tiny: Path) -> None:
    parent, source = toolchain.load(tiny), open_data("demo")
    settings = toolchain.DistillSettings(epochs=1)
    plan = paper_claim.plan_for(parent, source, 24, seed=0)
    trial = paper_claim.Trial("tiny", parent, plan, source, settings, calib_images=48)
    shapes = [
        {name: tensor.shape for name, tensor in paper_claim.student(trial, way).state_dict().items()}
        for way in paper_claim.WAYS
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]["norm.weight"] == (16,)
    weights = {way: paper_claim.recipe(settings, way, 1e-3).logit_weight for way in paper_claim.WAYS}
    assert weights == {"pruned": 6.4, "distilled": 6.4, "scratch": 0.0}


def test_random_start_differs_by_seed(tiny: Path) -> None:
    parent, source = toolchain.load(tiny), open_data("demo")
    plan = paper_claim.plan_for(parent, source, 24, seed=0)
    starts = [
        paper_claim.student(
            paper_claim.Trial("tiny", parent, plan, source, toolchain.DistillSettings(epochs=1, seed=seed), 48),
            "scratch",
        )
        for seed in (0, 0, 1)
    ]
    first, again, other = (model.state_dict()["blocks.0.mlp.fc1.weight"] for model in starts)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_better_learning_rate_counts() -> None:
    rows = [{"parent": "p", "way": "scratch", "lr": lr, "seed": seed, "top1": top1}
            for lr, seed, top1 in ((1e-3, 0, 90.0), (1e-3, 1, 50.0), (4e-3, 0, 75.0), (4e-3, 1, 76.0))]  # fmt: skip
    assert [row["top1"] for row in paper_claim.best_rates(rows)["p", "scratch"]] == [75.0, 76.0]


def test_record_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    record.write(path, record.document({"seeds": 3}, [{"a": 1}], more=2))
    record.write(path, record.document({"seeds": 1}, [], more=3))
    read = json.loads(path.read_text())
    assert read["settings"] == {"seeds": 1}
    assert {"date", "environment", "settings", "more", "rows"} == set(read)
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_spread_is_the_standard_deviation_over_seeds() -> None:
    assert record.spread([80.0, 82.0, None]) == "81.0 ± 1.4"
    assert record.spread([3.254], 2) == "3.25"
    assert record.spread([None]) == ""


def test_every_criterion_planner_and_peer_is_compared() -> None:
    names = list(one_shot.methods(False, Path("python")))
    assert {"random, uniform", "magnitude, uniform", "fisher, uniform", *peers.PEERS} <= set(names)
    assert len([name for name in names if name.endswith("compensated")]) >= len(one_shot.PLANNERS)
    assert set(one_shot.WITHOUT_CHANCE) <= set(names)
    assert not set(peers.PEERS) & set(one_shot.methods(False, None))
