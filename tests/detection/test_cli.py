"""`upvits-deploy detect` from end to end on a few small pictures, and what it says when something is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.detection.conftest import changed, detect, refused
from upvits.deploy.pipeline import build

pytestmark = [pytest.mark.usefixtures("mmdet"), pytest.mark.slow]

SMALL = ["--epochs", "1", "--batch-size", "4", "--scale", "64x64", "--workers", "0", "--fpn-channels", "16", "-q"]


@pytest.fixture(scope="module")
def run(mmdet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its fine-tuned network."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    values: dict[str, Any] = {
        "model": "pvtv2_b0", "plan": {"ratio": 0.5}, "score": {"method": "magnitude"},
        "compensate": {"enabled": False}, "distill": {"epochs": 0}, "bench": {"seconds": 0.2},
        "engine": {"runtime": "onnxruntime", "precision": "fp32,int8"},
        "precision": {"calib_images": 8, "max_drop": 100},
    }  # fmt: skip
    build(values, folder, until="distill")
    return folder


@pytest.fixture(scope="module")
def compared(run: Path, scenes: Path) -> Path:
    assert detect("compare", "--run", run, "--coco", scenes, *SMALL).exit_code == 0
    return run


@pytest.fixture
def untrained(run: Path, tmp_path: Path) -> Path:
    """A copy of the run without detectors."""
    shutil.copytree(run, tmp_path / "untrained", ignore=shutil.ignore_patterns("7-detect"))
    return tmp_path / "untrained"


def test_compare_measures_both_detectors(compared: Path) -> None:
    document = json.loads((compared / "7-detect/compare/detection.json").read_text())
    dense, pruned = document["detectors"]
    assert (dense["model"], pruned["model"]) == ("dense", "pruned")
    assert pruned["backbone_params"] < 0.4 * dense["backbone_params"]
    assert {(e["model"], e["runtime"], e["precision"]) for e in document["engines"]} == {
        (model, runtime, precision)
        for model in ("dense", "pruned")
        for runtime in ("onnxruntime",)
        for precision in ("fp32", "int8")
    }
    assert all(row["speedup"] > 0 for row in document["latency"])
    assert len(document["latency"]) == 2
    assert all(abs(e["drop"]) < 0.2 for e in document["engines"] if e["precision"] == "fp32")
    assert all(picture["data"].startswith("data:image/") for picture in document["pictures"])
    manifests = {path: path.read_bytes() for path in compared.glob("7-detect/*/manifest.json")}
    assert len(manifests) == 2 + 1 + 2 + 1  # detectors, the int8 graph, engines, the comparison
    assert detect("compare", "--run", compared, "-q").exit_code == 0  # settings are remembered
    assert all(path.read_bytes() == content for path, content in manifests.items())


def test_eval_judges_folders_and_files(compared: Path, scenes: Path, tmp_path: Path) -> None:
    result = detect("eval", compared, "--coco", scenes, "-o", tmp_path / "out")
    assert result.exit_code == 0
    figures = json.loads((tmp_path / "out/ap.json").read_text())
    assert sorted(figure["run_by"] for figure in figures.values()) == ["ONNX Runtime"] * 2 + ["PyTorch"] * 2
    by_torch, by_file = (
        next(figure["ap"] for name, figure in figures.items() if name.endswith(end))
        for end in ("pruned/detector", "pruned/model.onnx")
    )
    assert by_torch == pytest.approx(by_file, abs=0.002)
    detections = json.loads((tmp_path / "out/pruned-detector.json").read_text())
    assert all(box.keys() == {"image_id", "category_id", "bbox", "score"} for box in detections)
    assert all(len(line) <= 80 for line in result.output.splitlines()[:-1])


def test_shapes_are_exported(compared: Path, tmp_path: Path) -> None:
    folder = compared / "7-detect/pruned/detector"
    assert (
        detect("export", folder, "-o", tmp_path / "n.onnx", "--shape", "decode+nms", "--size", "64x96").exit_code == 0
    )
    with refused("exists"):
        detect("export", folder, "-o", tmp_path / "n.onnx")
    with refused("not of the shape"):
        detect("eval", tmp_path / "n.onnx")


def test_a_finished_detector_is_not_replaced(compared: Path, scenes: Path) -> None:
    weights = (compared / "7-detect/dense/detector/model.safetensors").read_bytes()
    with refused("trained otherwise: epochs is 1, 2 was asked for"):
        detect("train", "--run", compared, "--epochs", 2)
    with refused("trained otherwise: detector is retinanet, mask-rcnn was asked for"):
        detect("train", "--run", compared, "--detector", "mask-rcnn")
    assert (compared / "7-detect/dense/detector/model.safetensors").read_bytes() == weights
    assert json.loads((compared / "7-detect/recipe.json").read_text())["epochs"] == 1
    manifest = (compared / "7-detect/pruned/manifest.json").read_bytes()
    spelled = f"{scenes.parent}/./{scenes.name}/"
    assert detect("train", "--run", compared, "--coco", spelled, "-q").exit_code == 0  # the same folder
    assert (compared / "7-detect/pruned/manifest.json").read_bytes() == manifest


def test_limits_of_a_detector_go_into_its_file(compared: Path, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(compared / "7-detect/pruned/detector", folder)
    document = json.loads((folder / "detector.json").read_text())
    document["config"]["test_cfg"] |= {"score_thr": 1e-4, "max_per_img": 7}
    (folder / "detector.json").write_text(json.dumps(document))
    assert detect("export", folder, "-o", tmp_path / "n.onnx").exit_code == 0
    for target in (folder, tmp_path / "n.onnx"):
        out = tmp_path / f"found-{target.stem}"
        assert detect("eval", target, "--coco", scenes, "-o", out, "-q").exit_code == 0
        (detections,) = (path for path in out.iterdir() if path.name != "ap.json")
        assert len(json.loads(detections.read_text())) == 4 * 7


def test_what_is_refused(untrained: Path, scenes: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    run = untrained
    messages = {
        "model.neck.num_outs=4": "of 4 levels cannot be exported",
        "model.test_cfg.nms.type=soft_nms": "Of model.test_cfg only",
        "work_dir=elsewhere": "cannot set work_dir",
        f"load_from={tmp_path}/none.pth": "load_from: there is no file",
    }
    for option, message in messages.items():
        with refused(message):
            detect("train", "--run", run, "--coco", scenes, *SMALL, "--cfg-options", option)
    with refused("--scale 100x100 does not fit"):
        detect("train", "--run", run, "--coco", scenes, "--scale", "100x100")
    with refused("holds no data set in COCO's format"):
        detect("train", "--run", run, "--coco", tmp_path)
    with refused("has no fine-tuned network"):
        detect("train", "--run", tmp_path / "none", "--coco", scenes)
    with refused("detector: Input should be"):
        detect("train", "--run", run, "--coco", scenes, "--detector", "yolo")
    with refused("--cfg-options 'lr' is not valid"):
        detect("train", "--run", run, "--coco", scenes, "--cfg-options", "lr")
    for wrong in ("optim_wrapper.optimizer.type=AdamV", "model.bbox_head.nclasses=3", "optim_wrapper.optimiser.lr=1"):
        with refused("--cfg-options"):
            detect("train", "--run", run, "--coco", scenes, *SMALL, "--cfg-options", wrong)
    with refused("--cfg-options: there is no no_such"):
        detect("train", "--run", run, "--coco", scenes, *SMALL, "--cfg-options", "no_such.key=3")
    if not torch.cuda.is_available():
        with refused("--amp needs an NVIDIA GPU"):
            detect("train", "--run", run, "--coco", scenes, "--amp")
    with refused("--scale '64' is not valid"):
        detect("train", "--run", run, "--coco", scenes, "--scale", "64")
    with refused("holds no detector"):
        detect("eval", folders["dense"], "--coco", scenes)
    with refused("holds no detector"):
        detect("prune", folders["dense"], "-o", tmp_path / "out", "--coco", scenes, "--ratio", 0.5)


def test_another_size_of_the_export_trains_nothing_again(compared: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    weights = run / "7-detect/pruned/detector/model.safetensors"
    before = weights.read_bytes()
    recipe = json.loads((run / "7-detect/recipe.json").read_text())
    (run / "7-detect/recipe.json").write_text(json.dumps({**recipe, "size": [64, 96]}))
    result = detect("train", "--run", run, "--backbones", "pruned", "-q")
    assert result.exit_code == 0
    assert weights.read_bytes() == before
    assert json.loads((run / "7-detect/pruned/ap.json").read_text())["size"] == [64, 96]
    assert json.loads((run / "7-detect/pruned/ap.json").read_text())["turned"] is not None


def test_mask_rcnn_is_trained_and_judged(untrained: Path, scenes: Path, tmp_path: Path) -> None:
    run = untrained
    result = detect("train", "--run", run, "--coco", scenes, "--detector", "mask-rcnn", "--backbones", "pruned", *SMALL)
    assert result.exit_code == 0
    figures = json.loads((run / "7-detect/pruned/ap.json").read_text())
    assert figures["macs"] is None
    assert figures["pytorch"]["images"] == 4
    history = json.loads((run / "7-detect/pruned/history.json").read_text())
    assert "loss_mask" in history["1"]
    assert any((run / "7-detect/pruned/log").iterdir())
    assert figures["masks"]["images"] == 4
    assert figures["masks"]["detections"] == figures["pytorch"]["detections"]
    result = detect("eval", run / "7-detect/pruned/detector", "--coco", scenes, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "masks" in result.stdout
    (again,) = json.loads((tmp_path / "out/ap.json").read_text()).values()
    assert again["masks"] == figures["masks"]
    assert again["ap"] == figures["pytorch"]["ap"]
    without = changed(scenes, tmp_path / "c", lambda d: [box.pop("segmentation") for box in d["annotations"]])
    with refused("has boxes without masks"):
        detect("train", "--run", run, "--coco", without, "--detector", "mask-rcnn", *SMALL)
