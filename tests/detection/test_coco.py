"""Data sets that a detector can be trained on, and those it cannot: said before anything starts."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.detection.conftest import Document, changed
from upvits.calib_data import Preprocess
from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.detect_data import open_detection_data
from upvits.detection.average_precision import average_precision
from upvits.detection.coco import open_coco
from upvits.detection.pictures import fitted


def test_drawn_scenes(scenes: Path, tmp_path: Path) -> None:
    data = open_coco(scenes, tmp_path / "cache")
    assert (data.train.count, data.val.count, len(data.classes)) == (12, 4, 12)
    assert data.train.boxes == len(json.loads(data.train.annotations.read_text())["annotations"])
    assert data.notes == ()


def test_the_official_layout(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        shutil.copytree(scenes / split / "images", tmp_path / f"{split}2017")
        shutil.copy(scenes / split / "annotations.json", tmp_path / "annotations" / f"instances_{split}2017.json")
    assert open_coco(tmp_path, tmp_path / "cache").train.images == tmp_path / "train2017"
    shutil.rmtree(tmp_path / "val2017")
    with pytest.raises(UserError, match=r"instances_val2017\.json are not there"):
        open_coco(tmp_path, tmp_path / "cache")


def test_one_set_for_both_is_said(shared_data: Path, tmp_path: Path) -> None:
    data = open_coco(shared_data / "coco128", tmp_path / "cache")
    assert (data.train.count, len(data.classes)) == (128, 80)
    assert data.train == data.val
    assert any("same images" in note for note in data.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"].append({**d["images"][0], "id": 99, "file_name": "gone.png"}), "1 of 13 images"),
        (lambda d: d["annotations"][0].update(category_id=77), "categories that it does not name: 77"),
        (lambda d: d["annotations"][0].update(image_id=77), "images that it does not list: 77"),
        (lambda d: d["annotations"].clear(), "no usable box"),
        (lambda d: d["images"].clear() or d["annotations"].clear(), "lists no images"),
        (lambda d: d["categories"].clear(), "names no categories"),
        (lambda d: d["categories"].append(d["categories"][0]), "categories twice"),
        (lambda d: d["categories"].pop(), "different categories"),
        (lambda d: d.pop("categories"), "in COCO's format"),
        (lambda d: d["images"][0].update(width=640), "64 x 64 pixels, and"),
        (lambda d: [a.update(bbox=[0, 0, 0.5, 8]) for a in d["annotations"]], "no usable box"),
        (lambda d: [a.update(bbox=[70, 0, 8, 8]) for a in d["annotations"]], "no usable box"),
        (lambda d: [a.update(iscrowd=1) for a in d["annotations"]], "no usable box"),
        (lambda d: d["images"][0].pop("width"), "images.0.width: Field required"),
        (lambda d: d["images"][0].update(file_name="../../secret.png"), "images.0.file_name"),
        (lambda d: d["images"][0].update(file_name="/dev/zero"), "images.0.file_name"),
        (lambda d: d["images"][0].update(file_name=""), "images.0.file_name"),
        (lambda d: d["images"][0].update(id=d["images"][1]["id"]), "lists images twice"),
        (lambda d: d["categories"][0].pop("name"), "categories.0.name"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "annotations.0.bbox"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, None, 3]), "annotations.0.bbox.2"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 3]), "in COCO's format"),
        (lambda d: [c.update(id=c["id"] + 1) for c in d["categories"][-1:]], "categories"),
    ],
)
def test_what_cannot_be_learnt_from(
    change: Callable[[Document], object], message: str, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_coco(changed(scenes, tmp_path / "c", change), tmp_path / "cache")
    assert caught.value.exit_code == 2
    assert caught.value.fix


def gaps(document: Document) -> None:
    """Ids of categories with gaps, and in another order than their list."""
    for category in document["categories"]:
        category["id"] *= 10
    document["categories"].reverse()
    for number, box in enumerate(document["annotations"]):
        box.update(category_id=box["category_id"] * 10, id=number)
        box.pop("area")


def test_odd_boxes_are_counted(scenes: Path, tmp_path: Path) -> None:
    def odd(document: Document) -> None:
        boxes = document["annotations"]
        boxes[0].update(bbox=[5, 5, 0, 8])
        boxes[1].update(bbox=[64, 0, 9, 9])
        boxes[2].update(iscrowd=1)
        gaps(document)

    both = changed(scenes, tmp_path / "b", gaps, "val")
    folder = changed(both, tmp_path / "c", odd)
    data = open_coco(folder, tmp_path / "cache")
    assert data.train.boxes == open_coco(scenes, tmp_path / "cache").train.boxes - 3
    assert [note.partition(" ")[0] for note in data.train.notes] == ["1", "1", "1"]
    assert data.classes == open_coco(scenes, tmp_path / "cache").classes


@pytest.mark.parametrize("mask", [[[1, 2]], [[1, 2, 9, 9]], [[]], {"a": 1}, "x", [1, 2, 3, 4, 5, 6], None])
def test_what_is_no_mask_is_not_taken_for_one(mask: object, scenes: Path, tmp_path: Path) -> None:
    folder = changed(scenes, tmp_path / "c", lambda d: d["annotations"][0].update(segmentation=mask))
    data = open_coco(folder, tmp_path / "cache")
    assert open_coco(scenes, tmp_path / "cache").train.masks
    assert not data.train.masks
    with pytest.raises(UserError, match="boxes without masks"):
        data.require_masks()


def test_areas_that_cannot_be_are_those_of_the_boxes(scenes: Path, tmp_path: Path) -> None:
    folder = changed(scenes, tmp_path / "c", lambda d: [box.update(area=-1) for box in d["annotations"]])
    boxes = json.loads(open_coco(folder, tmp_path / "cache").train.annotations.read_text())["annotations"]
    assert all(box["area"] == pytest.approx(box["bbox"][2] * box["bbox"][3]) for box in boxes)


def test_pictures_of_16_bits_are_refused(scenes: Path, tmp_path: Path) -> None:
    folder = changed(scenes, tmp_path / "c", lambda d: None)
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(next((folder / "train/images").iterdir()))
    with pytest.raises(UserError, match="more than 8 bits"):
        open_coco(folder, tmp_path / "cache")


def test_no_data_set_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set in COCO's format"):
        open_coco(tmp_path, tmp_path / "cache")
    (tmp_path / "annotations.json").write_text("{ not json")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="Invalid JSON"):
        open_coco(tmp_path, tmp_path / "cache")


def test_pictures_of_odd_sizes_are_fitted_and_boxes_come_back(scenes: Path, tmp_path: Path) -> None:
    def upright(document: Document) -> None:
        first = document["images"][0]
        path = tmp_path / "c/val/images" / first["file_name"]
        with Image.open(path) as image:
            image.crop((0, 0, 37, 61)).save(path)
        first.update(width=37, height=61)

    data = open_coco(changed(scenes, tmp_path / "c", upright, "val"), tmp_path / "cache")
    assert all("outside" in note for note in data.notes)
    preprocess = Preprocess((3, 64, 96), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "border")
    first, *others = fitted(data.val, preprocess)
    assert (first.inside, first.original) == ((39, 64), (37, 61))
    assert first.pixels.shape == (3, 64, 96)
    assert float(first.pixels[:, :, 39:].abs().max()) == 0
    assert float(first.pixels[:, :, 38].abs().max()) > 0
    whole = np.array([[0, 0, 39, 64], [-5, 10, 200, 300]], np.float32)
    assert np.allclose(first.boxes_back(whole)[:, 2:], [37, 61], atol=0.5)
    assert float(first.boxes_back(whole).min()) == 0
    assert [image.image_id for image in fitted(data.val, preprocess, upright=True)] == [first.image_id]
    assert len(list(fitted(data.val, preprocess, upright=False))) == len(others)
    assert [image.image_id for image in fitted(data.val, preprocess, 2)] == [first.image_id, others[1].image_id]


@pytest.mark.usefixtures("mmdet")
def test_what_is_judged_by_is_in_one_form(scenes: Path, tmp_path: Path) -> None:
    both = changed(scenes, tmp_path / "b", gaps, "val")
    data = open_coco(changed(both, tmp_path / "c", gaps), tmp_path / "cache")
    assert data.category_ids == tuple(range(10, 130, 10))
    assert data.classes == open_coco(scenes, tmp_path / "cache").classes
    document = json.loads(data.val.annotations.read_text())
    assert [category["id"] for category in document["categories"]] == list(data.category_ids)
    perfect = [
        {**{k: box[k] for k in ("image_id", "category_id", "bbox")}, "score": 1.0} for box in document["annotations"]
    ]
    assert document["annotations"][0]["id"] == 1
    assert average_precision(data.val.annotations, perfect).ap == pytest.approx(1.0)
    wrong = [{**box, "category_id": 10 if box["category_id"] != 10 else 20} for box in perfect]
    assert average_precision(data.val.annotations, wrong).ap < 0.1


@pytest.mark.parametrize("content", [b"no image", b""])
def test_images_that_cannot_be_read(content: bytes, scenes: Path, tmp_path: Path) -> None:
    folder = changed(scenes, tmp_path / "c", lambda d: None)
    path = next((folder / "train/images").iterdir())
    path.write_bytes(content or path.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read"):
        open_coco(folder, tmp_path / "cache")


@pytest.mark.parametrize("what", ["eps", "pipe", "device"])
def test_an_image_that_is_none_is_neither_run_nor_waited_for(what: str, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    document = json.loads((folder / "train" / "annotations.json").read_text())
    image = folder / "train" / "images" / document["images"][0]["file_name"]
    image.unlink()
    if what == "eps":
        image.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    elif what == "pipe":
        os.mkfifo(image)
    else:
        image.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"cannot be read: cannot identify" if what == "eps" else "1 of 12 images"):
        open_coco(folder, tmp_path / "cache")


def laid_out(scenes: Path, root: Path, annotations: str, images: str, prefix: str = "") -> Path:
    """The drawn scenes in another layout; SPLIT, or another word for it, stands where the split is named."""
    words = {"train": ("train", "train", "Train"), "val": ("val", "valid", "Validation")}
    for split, (plain, roboflow, cvat) in words.items():

        def place(text: str, plain: str = plain, roboflow: str = roboflow, cvat: str = cvat) -> Path:
            return root / text.replace("SPLIT", plain).replace("ROBOFLOW", roboflow).replace("CVAT", cvat)

        shutil.copytree(scenes / split / "images", place(images), dirs_exist_ok=True)
        document = json.loads((scenes / split / "annotations.json").read_text())
        for image in document["images"]:
            image["file_name"] = prefix.replace("SPLIT", plain) + image["file_name"]
        place(annotations).parent.mkdir(parents=True, exist_ok=True)
        place(annotations).write_text(json.dumps(document))
    return root


@pytest.mark.parametrize(
    ("annotations", "images", "prefix"),
    [
        ("ROBOFLOW/_annotations.coco.json", "ROBOFLOW", ""),
        ("annotations/instances_SPLIT2014.json", "SPLIT2014", ""),
        ("annotations/instances_CVAT.json", "images/CVAT", ""),
        ("annotations/SPLIT.json", "images", ""),
        ("annotations/SPLIT.json", "SPLIT", "SPLIT/"),
        ("SPLIT.json", "data/SPLIT", ""),
        ("SPLIT/annotation_coco.json", "SPLIT", ""),
        ("deep/set/annotations/SPLIT.json", "deep/set/images/SPLIT", "SPLIT\\"),
        ("SPLIT/labels.json", "SPLIT/data", ""),
    ],
)
def test_layouts_are_found_by_looking(annotations: str, images: str, prefix: str, scenes: Path, tmp_path: Path) -> None:
    root = laid_out(scenes, tmp_path / "set", annotations, images, prefix)
    if images == "images":  # both splits in one folder: names differ there
        for index, file in enumerate(sorted((scenes / "train" / "images").iterdir())):
            shutil.copy(file, root / "images" / f"t{index}{file.suffix}")
        document = json.loads((root / "annotations/train.json").read_text())
        for index, image in enumerate(sorted(document["images"], key=lambda image: image["file_name"])):
            image["file_name"] = f"t{index}{Path(image['file_name']).suffix}"
        (root / "annotations/train.json").write_text(json.dumps(document))
    (root / "notes.json").write_text('{"by": "somebody"}')
    data, plain = (open_coco(place, tmp_path / "cache") for place in (root, scenes))
    assert (data.train.count, data.val.count) == (12, 4)
    assert (data.train.boxes, data.val.boxes) == (plain.train.boxes, plain.val.boxes)
    assert data.train.source != data.val.source


@pytest.mark.parametrize("name", ["result.json", "annotations/instances_default.json", "labels_my-project.json"])
def test_one_set_in_other_layouts(name: str, scenes: Path, tmp_path: Path) -> None:
    document = json.loads((scenes / "train" / "annotations.json").read_text())
    for image in document["images"]:
        image["file_name"] = f"images/{image['file_name']}" if name == "result.json" else image["file_name"]
    (tmp_path / "set" / name).parent.mkdir(parents=True)
    (tmp_path / "set" / name).write_text(json.dumps(document))
    shutil.copytree(scenes / "train" / "images", tmp_path / "set" / "images")
    data = open_coco(tmp_path / "set", tmp_path / "cache")
    assert (data.train.count, data.val.count) == (12, 12)
    assert any("same images" in note for note in data.notes)


def test_other_tasks_beside_instances_are_left_out(scenes: Path, tmp_path: Path) -> None:
    root = laid_out(scenes, tmp_path, "annotations/instances_SPLIT2017.json", "SPLIT2017")
    for split in ("train", "val"):
        source = root / "annotations" / f"instances_{split}2017.json"
        shutil.copy(source, root / "annotations" / f"person_keypoints_{split}2017.json")
        (root / "annotations" / f"captions_{split}2017.json").write_text('{"images": [], "annotations": ["caption"]}')
    (root / "annotations" / "image_info_test2017.json").write_text('{"images": [], "categories": []}')
    assert open_coco(root, tmp_path / "cache").val.source.name == "instances_val2017.json"


def test_several_that_fit_are_named(scenes: Path, tmp_path: Path) -> None:
    root = laid_out(scenes, tmp_path / "set", "annotations/SPLIT.json", "SPLIT")
    shutil.copy(root / "annotations/train.json", root / "annotations/train_small.json")
    with pytest.raises(UserError, match=r"annotations/train\.json, annotations/train_small\.json") as caught:
        open_coco(root, tmp_path / "cache")
    assert f'coco="{root}/annotations/train.json,{root}/annotations/val.json"' in caught.value.fix
    files = (root / "annotations/train_small.json", root / "annotations/val.json")
    assert open_coco(files, tmp_path / "cache").train.source == files[0]
    given = open_detection_data(",".join(map(str, files)), quiet=True)
    assert (given.train.source, given.val.source) == files


def test_images_that_may_be_in_two_folders_are_asked_for(scenes: Path, tmp_path: Path) -> None:
    root = laid_out(scenes, tmp_path / "set", "annotations/SPLIT.json", "a")
    shutil.copytree(root / "a", root / "b")
    with pytest.raises(UserError, match=r"may be in a, b"):
        open_coco(root, tmp_path / "cache")
