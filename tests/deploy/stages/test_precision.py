"""Precision inside a run: which graphs are made, what they cost, and what the gate does."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from upvits import toolchain
from upvits.calib_data.errors import GateError, UserError
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.measure import accuracy as measure_accuracy
from upvits.deploy.pipeline import build
from upvits.deploy.recipe.engines import precisions_for
from upvits.deploy.runtimes import runtime_named
from upvits.deploy.stages.precision import graph_name

CPU, RTX = runtime_named("onnxruntime"), runtime_named("tensorrt-rtx")


def test_what_is_built_when_nothing_is_asked_for() -> None:
    assert precisions_for(CPU, ("auto",)) == ("fp32", "int8")
    assert precisions_for(RTX, ("auto",)) == ("fp16", "int8")
    assert precisions_for(CPU, ("fp32", "auto", "fp32")) == ("fp32", "int8")
    assert precisions_for(CPU, ("fp8",)) == ()


def test_quantized_graphs_differ_in_what_runs_around_them() -> None:
    assert graph_name(CPU, "int8") == "int8-fp32"
    assert graph_name(RTX, "int8") == "int8-fp16"
    assert graph_name(RTX, "fp16") == "fp16"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A small ViT with weights that tell two kinds of pictures apart, and such pictures."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("val", 10)):
        for number, name in enumerate(("dark", "light")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(100 * number, 100 * number + 120, (32, 32, 3), generator=generator).byte()
                Image.fromarray(pixels.numpy()).save(folder / "photos" / split / name / f"{index}.png")
    torch.manual_seed(0)
    model = toolchain.create_model("deit_tiny", num_classes=2, image_size=32, model_args={"depth": 2})
    save_file(model.state_dict(), folder / "w.safetensors")
    return {
        "model": "deit_tiny", "weights": str(folder / "w.safetensors"), "data": f"imagefolder:{folder / 'photos'}",
        "image_size": 32, "model_args": {"depth": 2}, "plan": {"ratio": 0.5}, "score": {"method": "magnitude"},
        "distill": {"epochs": 0},
        "compensate": {"enabled": False}, "bench": {"seconds": 0.1, "batches": [1, 2]}, "allow_weak": True,
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_says_what_each_precision_costs_and_which_to_deploy(recipe: dict[str, object], tmp_path: Path) -> None:
    wanted = {**recipe, "engine": {"runtime": "onnxruntime"}, "precision": {"calib_images": 16, "max_drop": 100}}
    report = build(wanted, tmp_path / "run")
    assert report is not None
    record = json.loads((tmp_path / "run/4-precision/int8-fp32/precision.json").read_text())["pruned"]
    assert record["calibration"]["images"] == 16
    assert len(record["calibration"]["digest"]) == 64
    graph = onnx.load(tmp_path / "run/4-precision/int8-fp32/pruned/model.onnx")
    assert GraphFacts(graph).gemms()["int8"] == len(record["quantized"]) == 4 * 2 + 1
    assert record["worst_layer"] in record["quantized"]
    by_precision = {a.precision: a for a in report.accuracy if a.model == "pruned"}
    assert by_precision["fp32"].drop == 0
    assert by_precision["fp32"].sqnr_db > 90
    assert 20 < by_precision["int8"].sqnr_db < 90
    assert by_precision["int8"].measured_on == "the engine"
    assert by_precision["int8"].quantized == len(record["quantized"])
    (best,) = report.best
    others = {"fp32", "int8"} - {best.precision}
    assert set(best.passed_over) == others
    built = {(e.model, e.precision): e.built for e in report.engines}[("pruned", "int8")]
    assert built is not None
    assert built.gemms["int8"] == built.planned["int8"]
    assert report.layer_times
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.slow
def test_a_precision_asked_for_by_name_must_keep_its_accuracy(
    recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(*arguments: object, **options: object) -> object:
        found = original(*arguments, **options)  # type: ignore[arg-type]
        return type(found)(found.images, found.top1, found.agreement, 7.0, 3.0)

    import upvits.deploy.stages.precision as module

    original = measure_accuracy.accuracy
    monkeypatch.setattr(module, "accuracy", ruin)
    asked = {**recipe, "engine": {"runtime": "onnxruntime", "precision": "int8"}, "precision": {"calib_images": 8}}
    with pytest.raises(GateError, match=r"loses 7\.00 points in int8, 0\.5 are allowed"):
        build(asked, tmp_path / "asked", until="precision")
    auto = {**recipe, "engine": {"runtime": "onnxruntime"}, "precision": {"calib_images": 8}}
    report = build(auto, tmp_path / "asked")
    assert report is not None
    assert [engine.precision for engine in report.engines] == ["fp32", "fp32"]
    assert any("int8-fp32 engines were left out" in note and "7.00 points" in note for note in report.notes)
    record = json.loads((tmp_path / "asked/4-precision/int8-fp32/precision.json").read_text())["dense"]
    assert record["kept"], "every layer was tried out of int8 before it was given up"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"precision": "int9"}, "did you mean int8"),
        ({"runtime": "onnxruntime", "precision": "fp8"}, "No chosen runtime has fp8"),
        ({"runtime": "tensorrt-rtx", "precision": "fp8", "targets": ["sm86"]}, "sm89"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(
    recipe: dict[str, object], engine: dict[str, object], message: str, tmp_path: Path
) -> None:
    if engine.get("runtime") == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UserError, match=message):
        build({**recipe, "engine": engine}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
