"""What is written to disk: COCO annotations that pycocotools reads, and nothing of the user's overwritten."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upvits.calib_data import write_coco, write_imagefolder
from upvits.calib_data.drawing import CLASS_NAMES, draw_scene
from upvits.calib_data.errors import UserError


def test_coco_document(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "val", 12, 96)
    assert path == tmp_path / "val" / "annotations.json"
    document = json.loads(path.read_text())
    assert [category["name"] for category in document["categories"]] == list(CLASS_NAMES)
    assert len(document["images"]) == 12
    assert [item["id"] for item in document["annotations"]] == list(range(1, len(document["annotations"]) + 1))
    for image in document["images"]:
        scene = draw_scene(0, "val", image["id"] - 1, 96)
        with Image.open(tmp_path / "val" / "images" / image["file_name"]) as written:
            pixels = np.asarray(written)
        assert np.array_equal(pixels, scene.pixels)
        of_image = [item for item in document["annotations"] if item["image_id"] == image["id"]]
        assert [(item["category_id"] - 1, tuple(item["bbox"]), item["area"]) for item in of_image] == [
            (item.label, item.box, item.area) for item in scene.objects
        ]
    assert sorted(path.name for path in (tmp_path / "val").iterdir()) == ["annotations.json", "images"]


def test_pycocotools_reads_it_and_a_perfect_detector_scores_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truth = coco.COCO(str(write_coco(tmp_path, "train", 8, 128)))
    found = [{**item, "score": 0.9} for item in truth.loadAnns(truth.getAnnIds())]
    evaluation = cocoeval.COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_image_folder_layout(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, "train", 24, 32)
    for name in CLASS_NAMES:
        files = list((tmp_path / "train" / name).iterdir())
        assert len(files) == 2
        with Image.open(files[0]) as image:
            assert image.size == (32, 32)


@pytest.mark.parametrize("write", [write_imagefolder, write_coco])
def test_nothing_is_overwritten(tmp_path: Path, write: Callable[[Path, str, int, int], object]) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write(tmp_path, "val", 2, 32)
    assert [path.name for path in (tmp_path / "val").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("write", [write_imagefolder, write_coco])
def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, write: Callable[[Path, str, int, int], object]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="Cannot write"):
        write(tmp_path / "file", "val", 2, 32)
