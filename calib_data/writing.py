"""Writes the drawn pictures to disk: as class folders, or as COCO annotations with boxes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image

from upvits.calib_data.drawing import CLASS_NAMES, draw_labelled, draw_scene
from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import watched


def write_imagefolder(folder: Path, split: str, count: int, size: int, *, seed: int = 0, quiet: bool = True) -> None:
    """Writes `count` pictures of size x size as folder/split/CLASS/NNNNNN.png.

    Args:
        folder: the root; other splits may be there already, this one must be empty or missing.
        split: "train" or "val".
    """
    root = _new_folder(folder / split)
    for name in CLASS_NAMES:
        (root / name).mkdir()
    for index in watched(range(count), f"writing {split}", quiet=quiet):
        pixels, label = draw_labelled(seed, split, index, size)
        Image.fromarray(pixels).save(root / CLASS_NAMES[label] / f"{index:06d}.png")


def write_coco(folder: Path, split: str, count: int, size: int, *, seed: int = 0, quiet: bool = True) -> Path:
    """Writes `count` scenes as folder/split/images/NNNNNN.png and annotations.json beside; returns the JSON's path.

    The JSON is in COCO's detection format: ids from 1, boxes (x, y, width, height) in pixels, `area` the number of
    pixels of the object, `segmentation` its mask as runs. It is written last, so that its existence means that the
    split is whole.
    """
    root = _new_folder(folder / split)
    (root / "images").mkdir()
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in watched(range(count), f"writing {split}", quiet=quiet):
        scene = draw_scene(seed, split, index, size)
        name = f"{index:06d}.png"
        Image.fromarray(scene.pixels).save(root / "images" / name)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for item in scene.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": item.label + 1,
                    "bbox": list(item.box),
                    "area": item.area,
                    "segmentation": {"size": [size, size], "counts": list(item.runs)},
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": label + 1, "name": name, "supercategory": name.split("_")[1]} for label, name in enumerate(CLASS_NAMES)
    ]
    document = {
        "info": {"description": f"drawn scenes, seed {seed}, split {split}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path = root / "annotations.json"
    path.with_suffix(".tmp").write_text(json.dumps(document))
    os.replace(path.with_suffix(".tmp"), path)
    return path


def _new_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty.", why="Nothing is overwritten.", fix="Give a new folder.")
    except OSError as error:
        raise UserError(
            f"Cannot write to {folder}: {error.strerror or error}.", fix="Give a folder that can be written to."
        ) from None
    return folder
