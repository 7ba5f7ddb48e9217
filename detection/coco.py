"""Data sets in COCO's format: opened, checked, and brought into a form that mmdet and pycocotools read alike.

Files in the wild leave out areas, number boxes from 0, list categories in any order, and hold boxes that are flat or
outside of their image. mmdet and pycocotools each make something else of that, some of it silently wrong. So detectors
are trained on and judged by a copy of the annotations in the user's cache, in which all of that is put right.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from upvits.calib_data.decoding import DECODING_ERRORS, open_image
from upvits.calib_data.documents import Name, Number, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.paths import RelativePath
from upvits.detection.coco_layout import annotation_files, images_folder

_SHOWN = 3  # examples in a message
_SIZES_READ = 500  # images that are read, at most
_FARTHEST = 1_000_000  # pixels; pycocotools walks along the sides of a polygon
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")


@dataclass(frozen=True, slots=True)
class Split:
    """Images and their boxes.

    Attributes:
        source: the JSON file that was given.
        annotations: the copy that is used: categories sorted by id, boxes numbered from 1, all of them usable.
        images: folder of the images.
        count: images.
        boxes: boxes to train on (crowds not counted).
        masks: whether each of them comes with a mask.
        notes: what is odd about the data, but no reason to stop.
    """

    source: Path
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
                    f"{split.source} has boxes without masks.",
                    why="Mask R-CNN learns masks, too.",
                    fix='Give annotations with `segmentation`, or train `detector="retinanet"`.',
                )

    @property
    def digest(self) -> str:
        """sha256 of the annotations of both splits."""
        digest = hashlib.sha256()
        for split in (self.train, self.val):
            digest.update(split.annotations.read_bytes())
        return digest.hexdigest()


_Id = Annotated[int, Field(ge=-(2**53), le=2**53)]
_Side = Annotated[int, Field(ge=1, le=1_000_000)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


def _with_slashes(name: object) -> object:
    """Tools on Windows write backslashes."""
    return name.replace("\\", "/") if isinstance(name, str) else name


class _Image(_Entry):
    id: _Id
    file_name: Annotated[RelativePath, BeforeValidator(_with_slashes)]
    width: _Side
    height: _Side


class _Box(_Entry):
    id: _Id | None = None
    image_id: _Id
    category_id: _Id
    bbox: tuple[Number, Number, Number, Number]
    area: Number | None = None
    iscrowd: bool = False
    segmentation: Any = None


class _Category(_Entry):
    id: _Id
    name: Name


class Annotations(_Entry):
    """An annotation file, as far as it is used."""

    images: Annotated[list[_Image], FailFast()]
    annotations: Annotated[list[_Box], FailFast()]
    categories: Annotated[list[_Category], FailFast()]


_NEEDED = (
    "Files in COCO's format have lists of images (id, file_name, width, height), annotations (image_id, category_id, "
    "bbox) and categories (id, name): give instance annotations, not captions or results."
)


def open_coco(place: Path | tuple[Path, Path], cache: Path) -> CocoData:
    """Find and check a data set.

    Where annotations and images lie is found by looking, see `detection/coco_layout.py`. A data set with one file of
    annotations is validated on the images that it is trained on.

    Args:
        place: folder of the data set, or the two files of annotations, for training and validation; nothing is written
            there.
        cache: folder for the copies of the annotations.

    Raises:
        UserError: there is no such data set here, or nothing can be learnt or judged from it.
    """
    sources = place if isinstance(place, tuple) else annotation_files(place)
    files = dict(zip(("train", "val"), sources, strict=True))
    documents = {name: read_annotations(source) for name, source in files.items()}
    categories = _categories(documents["train"], files["train"])
    if _categories(documents["val"], files["val"]) != categories:
        raise UserError(
            f"{files['train']} and {files['val']} have different categories.",
            why="A detector is judged on the categories that it was trained on, by the same ids.",
            fix="Give both annotation files the same list of categories.",
        )
    splits = {}
    for name, source in files.items():
        root = _root_of(source) if isinstance(place, tuple) else place
        images = images_folder([image.file_name for image in documents[name].images], source, root)
        splits[name] = _checked(documents[name], source, images, cache)
    notes = [f"{name}: {note}" for name, split in splits.items() for note in split.notes]
    if files["train"] == files["val"]:
        notes = [*splits["train"].notes, "training and validation use the same images: AP says nothing about others"]
    ids, classes = zip(*categories, strict=True)
    return CocoData(splits["train"], splits["val"], classes, ids, tuple(notes))


def _root_of(annotations: Path) -> Path:
    """The folder of a data set that a file of annotations belongs to."""
    return annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent


def read_annotations(path: Path) -> Annotations:
    """An annotation file. Numbers may be written as files in the wild have them: `640.0`, `iscrowd: 0`.

    Raises:
        UserError: it is not in COCO's format; names the entry.
    """
    return read_document(path, Annotations, fix=_NEEDED, strict=False, largest=2 << 30, plain=False)


def _categories(document: Annotations, path: Path) -> list[tuple[int, str]]:
    """Ids and names, by id."""
    if not document.categories:
        raise UserError(f"{path} names no categories.", fix="Add the list `categories`.")
    names = Counter(category.name for category in document.categories)
    ids = Counter(category.id for category in document.categories)
    twice = [str(entry) for entry, count in (*names.items(), *ids.items()) if count > 1]
    if twice:
        raise UserError(f"{path} has categories twice: {_some(twice)}.", fix="Give every category its own name and id.")
    return sorted((category.id, category.name) for category in document.categories)


def _checked(document: Annotations, path: Path, images: Path, cache: Path) -> Split:
    """The split, with notes on odd boxes; data that would fail later, or be ignored silently, are refused."""
    known = {image.id: image for image in document.images}
    if len(known) < len(document.images):
        twice = [number for number, count in Counter(image.id for image in document.images).items() if count > 1]
        raise UserError(f"{path} lists images twice: {_some(twice)}.", fix="Give every image its own id.")
    _require_files(document.images, path, images)
    unnamed = sorted({b.category_id for b in document.annotations} - {category.id for category in document.categories})
    if unnamed:
        raise UserError(
            f"{path} has boxes of categories that it does not name: {_some(unnamed)}.",
            fix="Name them in `categories`, or remove their boxes.",
        )
    unlisted = sorted({box.image_id for box in document.annotations} - known.keys())
    if unlisted:
        raise UserError(
            f"{path} has boxes on images that it does not list: {_some(unlisted)}.",
            fix="List the images, or remove the boxes.",
        )
    flat = [box for box in document.annotations if min(box.bbox[2:]) < 1]
    outside = [box for box in document.annotations if min(box.bbox[2:]) >= 1 and _is_outside(box, known[box.image_id])]
    left_out = {id(box) for box in (*flat, *outside)}
    usable = [box for box in document.annotations if id(box) not in left_out]
    to_train = [box for box in usable if not box.iscrowd]
    if not to_train:
        raise UserError(
            f"{path} has no usable box.",
            why="Nothing can be learnt, and AP is not defined.",
            fix="Give boxes [x, y, width, height] in pixels, at least one pixel large and inside of their image.",
        )
    counted = {
        "boxes without area are left out": len(flat),
        "boxes outside of their image are left out": len(outside),
        "crowd boxes are not trained on, and detections on them count as neither right nor wrong": len(usable)
        - len(to_train),
    }
    return Split(
        source=path,
        annotations=_normalised(document, usable, cache),
        images=images,
        count=len(known),
        boxes=len(to_train),
        masks=all(_is_mask(box.segmentation) for box in to_train),
        notes=tuple(f"{count} {text}" for text, count in counted.items() if count),
    )


def _is_mask(value: Any) -> bool:
    """Whether it is polygons or runs, as pycocotools takes them."""
    if isinstance(value, list):
        return bool(value) and all(_is_polygon(part) for part in value)
    if not isinstance(value, dict):
        return False
    size, runs = value.get("size"), value.get("counts")
    return isinstance(size, list) and len(size) == 2 and isinstance(runs, (list, str)) and bool(runs)


def _is_polygon(value: Any) -> bool:
    """x1, y1, x2, y2, ... of three corners or more."""
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(isinstance(coordinate, (int, float)) and abs(coordinate) <= _FARTHEST for coordinate in value)
    )


def _is_outside(box: _Box, image: _Image) -> bool:
    x, y, width, height = box.bbox
    return min(x + width, image.width) <= max(x, 0) or min(y + height, image.height) <= max(y, 0)


def _normalised(document: Annotations, boxes: Sequence[_Box], cache: Path) -> Path:
    """The file of these annotations in a form that mmdet and pycocotools read alike; written once for each content."""
    annotations = [
        {
            "id": number,
            "image_id": box.image_id,
            "category_id": box.category_id,
            "bbox": list(box.bbox),
            "area": box.area if box.area and box.area > 0 else box.bbox[2] * box.bbox[3],
            "iscrowd": int(box.iscrowd),
            **({"segmentation": box.segmentation} if _is_mask(box.segmentation) else {}),
        }
        for number, box in enumerate(boxes, 1)
    ]
    content = json.dumps({
        "images": [image.model_dump() for image in document.images],
        "annotations": annotations,
        "categories": [entry.model_dump() for entry in sorted(document.categories, key=lambda category: category.id)],
    }).encode()  # fmt: skip
    path = cache / "coco" / f"{hashlib.sha256(content).hexdigest()[:20]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as draft:
            (Path(draft) / path.name).write_bytes(content)
            os.replace(Path(draft) / path.name, path)
    return path


def _require_files(images: Sequence[_Image], path: Path, folder: Path) -> None:
    if not images:
        raise UserError(f"{path} lists no images.", fix="Give the annotations of some images.")
    missing = [image.file_name for image in images if not (folder / image.file_name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} images of {path} are not in {folder}: {_some(missing)}.",
            fix="Download them, or remove them from the annotations.",
        )
    for image in images[:: -(-len(images) // _SIZES_READ)]:
        try:
            with open_image(folder / image.file_name) as opened:
                opened.load()
                size, mode = opened.size, opened.mode
        except DECODING_ERRORS as error:
            raise UserError(
                f"{folder / image.file_name} cannot be read: {error}.", fix="Download it again, or remove it."
            ) from error
        if mode in _DEEP:
            raise UserError(
                f"{folder / image.file_name} has more than 8 bits a channel (mode {mode}).",
                why="Libraries read such images in different ways.",
                fix="Convert the images to 8 bits a channel.",
            )
        if size != (image.width, image.height):
            raise UserError(
                f"{folder / image.file_name} has {size[0]} x {size[1]} pixels, and {path} says {image.width} x "
                f"{image.height}.",
                why="Boxes would be scaled wrongly. Rotation marks (EXIF) are not followed.",
                fix="Correct the annotations, or use the images that they were made for.",
            )


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more
