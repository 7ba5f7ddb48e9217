"""`upvits-deploy detect prune` from end to end on a small detector."""

import json
from pathlib import Path

import pytest

from tests.detection.conftest import detect, refused, small_retinanet
from upvits.detection.coco import CocoData
from upvits.detection.detector import DetectorInfo, save_detector

pytestmark = [pytest.mark.usefixtures("mmdet"), pytest.mark.slow]


@pytest.fixture
def dense(folders: dict[str, Path], data: CocoData, tmp_path: Path) -> Path:
    detector, model = small_retinanet(folders["dense"], len(data.classes))
    save_detector(detector, DetectorInfo(model, data.classes, data.category_ids, (64, 64)), tmp_path / "detector")
    return tmp_path / "detector"


def test_a_detector_is_pruned_itself(dense: Path, scenes: Path, tmp_path: Path) -> None:
    result = detect(
        "prune", dense, "-o", tmp_path / "out", "--coco", scenes, "--ratio", 0.5, "--head-ratio", 0.5, "--images", 10,
        "--epochs", 1, "--batch-size", 4, "--workers", 0,
    )  # fmt: skip
    assert result.exit_code == 0
    figures = {
        stage: json.loads((tmp_path / "out" / stage / "ap.json").read_text()) for stage in ("0-dense", "3-train")
    }
    assert figures["3-train"]["macs"] < 0.4 * figures["0-dense"]["macs"]
    for wrong, message in {
        (): "give ratio or target_macs for the backbone",
        ("--ratio", 1.5): "less than 1",
        ("--ratio", 0.5, "--target-macs", 0.5): "not both",
        ("--target-macs", 0.001): "cannot be reached",
    }.items():
        with refused(message):
            detect("prune", dense, "-o", tmp_path / "none", "--coco", scenes, *wrong)
        assert not (tmp_path / "none").exists()
    with refused("--imitation and --head-ratio exclude each other"):
        detect(
            "prune",
            dense,
            "-o",
            tmp_path / "o",
            "--coco",
            scenes,
            "--ratio",
            0.5,
            "--head-ratio",
            0.5,
            "--imitation",
            1,
        )
    assert "fine-tuned" in result.output
