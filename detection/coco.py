"""Data sets in COCO's format: where their files are, and whether a detector can be trained on them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from calib_data.errors import UserError

_SHOWN = 3  # examples in a message
_SIZES_READ = 500  # images whose headers are read, at least


@dataclass(frozen=True, slots=True)
class Split:
    """Images and their boxes.

    Attributes:
        annotations: the JSON file.
        images: folder of the images.
        count: images.
        boxes: boxes that are usable (crowds not counted).
        masks: whether every box comes with a mask.
        notes: what is odd about it, but no reason to stop.
    """

    annotations: Path
    images: Path
    count: int
    boxes: int
    masks: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CocoData:
    """A data set for detection. `classes` and `category_ids` are in the order of labels, which is that of the ids."""

    train: Split
    val: Split
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())

    def require_masks(self) -> None:
        """What Mask R-CNN needs.

        Raises:
            UserError: there are boxes without masks.
        """
        for split in (self.train, self.val):
            if not split.masks:
                raise UserError(
                    f"{split.annotations} has boxes without masks.",
                    why="Mask R-CNN learns masks, too.",
                    fix="Give annotations with `segmentation`, or train --detector retinanet.",
                )

    @property
    def digest(self) -> str:
        """sha256 of both annotation files."""
        found = hashlib.sha256()
        for split in (self.train, self.val):
            found.update(split.annotations.read_bytes())
        return found.hexdigest()


def open_coco(folder: Path) -> CocoData:
    """Find and check a data set.

    Three layouts are known: the official one (`annotations/instances_train2017.json`, `train2017/`, the same with
    `val2017`), one folder per split (`train/annotations.json`, `train/images/`), and a single set
    (`annotations.json`, `images/`), which is then validated on the images that it is trained on.

    Raises:
        UserError: there is no such data set here, or nothing can be learnt or judged from it.
    """
    places = _places(folder)
    documents = {name: _read(annotations) for name, (annotations, _) in places.items()}
    classes = _classes(documents["train"], places["train"][0])
    if _classes(documents["val"], places["val"][0]) != classes:
        raise UserError(
            f"The splits of {folder} have different categories.",
            why="A detector is judged on the categories that it was trained on.",
            fix="Give both annotation files the same list of categories.",
        )
    splits = {name: _checked(documents[name], *places[name]) for name in places}
    notes = [f"{name}: {note}" for name, split in splits.items() for note in split.notes]
    if places["train"] == places["val"]:
        notes = [*splits["train"].notes, "training and validation use the same images: AP says nothing about others"]
    ids = tuple(sorted(category["id"] for category in documents["train"]["categories"]))
    return CocoData(splits["train"], splits["val"], classes, ids, tuple(notes))


def _places(folder: Path) -> dict[str, tuple[Path, Path]]:
    official = {
        name: (folder / "annotations" / f"instances_{name}2017.json", folder / f"{name}2017")
        for name in ("train", "val")
    }
    apart = {name: (folder / name / "annotations.json", folder / name / "images") for name in ("train", "val")}
    single = dict.fromkeys(("train", "val"), (folder / "annotations.json", folder / "images"))
    for layout in (official, apart, single):
        if layout["train"][0].is_file():
            missing = [str(path) for place in layout.values() for path in place if not path.exists()]
            if missing:
                raise UserError(
                    f"{folder} is not complete: {', '.join(missing)} not found.",
                    fix="Download or link what is missing.",
                )
            return layout
    raise UserError(
        f"{folder} holds no data set in COCO's format.",
        why="Looked for annotations/instances_train2017.json, train/annotations.json and annotations.json.",
        fix="Give the folder that holds train2017, val2017 and annotations.",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.", fix="Is the file complete, and JSON?") from error
    if not isinstance(document, dict) or not {"images", "annotations", "categories"} <= document.keys():
        raise UserError(
            f"{path} is not in COCO's format.", why="It needs lists of images, annotations and categories.",
            fix="Give instance annotations, not captions or results.",
        )  # fmt: skip
    return document


def _classes(document: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    categories = sorted(document["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    if not names:
        raise UserError(f"{path} names no categories.", fix="Add the list `categories`.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    twice += [str(i) for i, count in Counter(category["id"] for category in categories).items() if count > 1]
    if twice:
        raise UserError(
            f"{path} has categories twice: {', '.join(twice[:_SHOWN])}.", fix="Give each a name of its own."
        )
    return tuple(names)


def _checked(document: Mapping[str, Any], path: Path, images: Path) -> Split:
    """The split, with what is odd about its boxes; refuses what would fail or be ignored silently."""
    known = {image["id"]: image for image in document["images"]}
    _require_files(document["images"], path, images)
    categories = {category["id"] for category in document["categories"]}
    strangers = sorted({box["category_id"] for box in document["annotations"]} - categories, key=str)
    if strangers:
        raise UserError(
            f"{path} has boxes of categories that it does not name: {_some(strangers)}.",
            fix="Name them in `categories`, or remove their boxes.",
        )
    lost = sorted({box["image_id"] for box in document["annotations"]} - known.keys(), key=str)
    if lost:
        raise UserError(
            f"{path} has boxes on images that it does not list: {_some(lost)}.",
            fix="List the images, or remove the boxes.",
        )
    crowds, flat, outside, usable = 0, 0, 0, 0
    for box in document["annotations"]:
        x, y, width, height = box["bbox"]
        image = known[box["image_id"]]
        inside_w = min(x + width, image["width"]) - max(x, 0)
        inside_h = min(y + height, image["height"]) - max(y, 0)
        crowds += bool(box.get("iscrowd"))
        flat += width < 1 or height < 1
        outside += width >= 1 and height >= 1 and (inside_w <= 0 or inside_h <= 0)
        usable += inside_w > 0 and inside_h > 0 and width >= 1 and height >= 1 and not box.get("iscrowd")
    if not usable:
        raise UserError(
            f"{path} has no usable box.", why="Nothing can be learnt, and AP is not defined.",
            fix="Give boxes [x, y, width, height] in pixels, at least one pixel large and inside of their image.",
        )  # fmt: skip
    counted = {
        "boxes without area are left out": flat,
        "boxes outside of their image are left out": outside,
        "crowd boxes are not trained on, and detections on them count as neither right nor wrong": crowds,
    }
    notes = tuple(f"{count} {text}" for text, count in counted.items() if count)
    masks = all(box.get("segmentation") for box in document["annotations"])
    return Split(path, images, len(known), usable, masks, notes)


def _require_files(images: Sequence[Mapping[str, Any]], path: Path, folder: Path) -> None:
    if not images:
        raise UserError(f"{path} lists no images.", fix="Give the annotations of some images.")
    missing = [str(image["file_name"]) for image in images if not (folder / image["file_name"]).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} images of {path} are not in {folder}: {_some(missing)}.",
            fix="Download them, or remove them from the annotations.",
        )
    for image in images[:: max(1, len(images) // _SIZES_READ)]:  # sizes decide how boxes are scaled
        with Image.open(folder / image["file_name"]) as opened:
            if opened.size != (image["width"], image["height"]):
                raise UserError(
                    f"{folder / image['file_name']} has {opened.size[0]} x {opened.size[1]} pixels, and {path} says "
                    f"{image['width']} x {image['height']}.",
                    why="Boxes would be scaled wrongly.",
                    fix="Correct the annotations, or use the images that they were made for.",
                )


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more
