"""Where the annotations and the images of a data set in COCO's format lie: found by looking, not by one list of names.

Known from the wild: `annotations/instances_train2017.json` beside `train2017/` (COCO, of any year, and mmdet's users),
`train/_annotations.coco.json` among its images (Roboflow), `annotations/instances_default.json` beside `images/`
(CVAT), `result.json` whose file names have folders (Label Studio).
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular

_DEPTH = 3  # folders that are looked into
_MOST = 500  # folders, in all
_SAMPLE = 20  # images that a folder is judged by
_OTHER = ("captions", "person_keypoints", "stuff_", "panoptic", "image_info")
_LIKELY = ("annotations.json", "_annotations.coco.json", "result.json", "instances_default.json")
_SPLITS = {
    "train": "train", "training": "train", "trainval": "train", "val": "val", "valid": "val", "validation": "val",
    "minival": "val", "eval": "val", "test": "test", "testing": "test",
}  # fmt: skip


def annotation_files(folder: Path) -> tuple[Path, Path]:
    """The files with the annotations for training and validation; one and the same where there is one.

    Raises:
        UserError: there is none, or several may be meant.
    """
    found = [path for place in _folders(folder) for path in sorted(place.glob("*.json")) if _is_instances(path)]
    named = [path for path in found if path.name.startswith("instances")]
    by_split: dict[str | None, list[Path]] = {}
    for path in found:
        same_folder = [other for other in named if other.parent == path.parent]
        if path in named or not same_folder:  # beside instances_*.json, others are of other tasks
            by_split.setdefault(split_of(path, folder), []).append(path)
    train = by_split.get("train") or by_split.get(None, [])
    val = by_split.get("val") or by_split.get("test") or train
    if not train:
        raise UserError(
            f"{folder} holds no data set in COCO's format.",
            why="Looked for JSON with images and annotations in it and in the folders within"
            + (f"; {_some(val, folder)} is not for training." if val else "."),
            fix='Give the folder that holds images and annotations, or the files: `coco="TRAIN.json,VAL.json"`.',
        )
    for files, what in ((train, "training"), (val, "validation")):
        if len(files) > 1:
            raise UserError(
                f"{folder} has several annotation files that may be for {what}: {_some(files, folder)}.",
                why="A detector is trained on one and judged by one.",
                fix=f'Name both: `coco="{files[0]},{val[0] if val != files else files[-1]}"`.',
            )
    return train[0], val[0]


def images_folder(names: Sequence[str], annotations: Path, root: Path) -> Path:
    """The folder that the file names of annotations are relative to: near the file, or named like its split.

    Args:
        names: paths as they stand in the annotations.
        root: folder of the data set.

    Raises:
        UserError: the images are in none, or in several that fit equally well.
    """
    if not names:
        return annotations.parent
    sample = list(names[:: -(-len(names) // _SAMPLE)])
    split = split_of(annotations, root)
    ranked: dict[tuple[int, int], list[Path]] = {}
    for place in dict.fromkeys((annotations.parent, *_folders(root))):
        distance = _distance(place, annotations, split_of(place, root), split)
        present = 0 if distance is None else sum((place / name).is_file() for name in sample)
        if distance is not None and present:
            ranked.setdefault((-present, distance), []).append(place)
    if not ranked:
        raise UserError(
            f"The images of {annotations} are not there, for example {names[0]}.",
            why=f"No folder in {root} has this file, those of other splits left aside.",
            fix="Download or link what is missing.",
        )
    best = ranked[min(ranked)]
    if len({place.resolve() for place in best}) > 1:
        raise UserError(
            f"The images of {annotations} may be in {_some(best, root)}.",
            why="File names are the same in these folders.",
            fix="Rename the folders like the splits (train, val), or put the annotations beside the images.",
        )
    return best[0]


def split_of(path: Path, root: Path) -> str | None:
    """What a file or folder is for by its own name, or else by the names of the folders around it below the root.

    >>> split_of(Path("/set/annotations/instances_val2017.json"), Path("/set"))
    'val'
    """
    parts = path.relative_to(root).parts if path.is_relative_to(root) else (path.name,)
    for part in reversed(parts):
        for word in re.findall("[a-z]+", part.lower().removesuffix(".json")):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _distance(place: Path, annotations: Path, of_place: str | None, split: str | None) -> int | None:
    """0: the folder of the file, or `images` in it; 1: of the same split; 2: of none. None: of another split, whose
    images may have the same names.
    """
    if place in (annotations.parent, annotations.parent / "images"):
        return 0
    if of_place is None or of_place == split:
        return 1 if of_place else 2
    return 2 if split is None else None


def _folders(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The folder and those within it, links followed; not beyond a depth and a number."""
    level, count = [root], 0
    for _ in range(depth + 1):
        below: list[Path] = []
        for place in level:
            yield place
            count += 1
            if count >= _MOST:
                return
            below += _subfolders(place)
        level = below


def _subfolders(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            return sorted(Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return []


def _is_instances(path: Path) -> bool:
    """Whether a file holds annotations, by its words; a known name is believed, and what is wrong is said later."""
    if path.name.lower().startswith(_OTHER):
        return False
    require_regular(path, fix="Remove it, or put the annotations in its place.")
    if path.name.lower() in _LIKELY:
        return True
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            has_lists = text.find(b'"images"') >= 0 and text.find(b'"annotations"') >= 0
            return has_lists and (text.find(b'"bbox"') >= 0 or text.find(b'"caption"') < 0)


def _some(paths: Sequence[Path], root: Path) -> str:
    names = [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
