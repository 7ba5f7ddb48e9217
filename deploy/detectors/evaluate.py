"""Judging detectors that lie somewhere: in a run, in a folder, or in an exported file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onnx import TensorProto

from upvits.calib_data import Preprocess
from upvits.calib_data.errors import UserError
from upvits.deploy.detectors import judge
from upvits.deploy.detectors.export import export_detector
from upvits.deploy.detectors.flow import RECIPE
from upvits.deploy.detectors.suppression import Limits, limits_of
from upvits.deploy.detectors.train_stage import DETECT
from upvits.deploy.graphs.files import load_model
from upvits.deploy.recipe.detect import size_for
from upvits.deploy.runtimes import open_model
from upvits.deploy.stages.job import write_json
from upvits.deploy.store.artifacts import disk_errors
from upvits.detection import openmm
from upvits.detection.average_precision import AveragePrecision, average_precision
from upvits.detection.coco import CocoData
from upvits.detection.detector import load_detector
from upvits.detection.pictures import Fitted, fitted
from upvits.toolchain.training.processes import pick_device


@dataclass(frozen=True, slots=True)
class Judged:
    """A detector on validation images.

    Attributes:
        name: the folder or file.
        run_by: PyTorch or ONNX Runtime.
        precision: of boxes.
        masks: of masks, where the detector finds them and the data have them.
        found: detections in COCO's result format.
    """

    name: str
    run_by: str
    precision: AveragePrecision
    masks: AveragePrecision | None
    found: list[dict[str, Any]]


def targets_of(path: Path) -> list[Path]:
    """Detector folders and ONNX files that a path names: itself, or all of a run.

    Raises:
        UserError: there are none.
    """
    if path.is_file() or (path / "detector.json").is_file():
        return [path]
    found = [path / DETECT / name / part for name in ("dense", "pruned") for part in ("detector", "model.onnx")]
    found = [own for own in found if own.exists()]
    if not found:
        raise UserError(
            f"{path} holds no detector.",
            why="Looked for detector.json, and for detectors in 7-detect of a run.",
            fix="Give a run after `upvits-deploy detect train`, a detector folder, or an exported ONNX file.",
        )
    return found


def coco_of(path: Path) -> str:
    """The data that the detectors of a run were trained on; the demo for anything else."""
    recipe = path / DETECT / RECIPE
    return str(json.loads(recipe.read_text())["coco"]) if recipe.is_file() else "demo"


def evaluate(path: Path, data: CocoData, most: int | None = None, *, quiet: bool = True) -> Judged:
    """AP of a detector folder (by PyTorch) or of an exported ONNX file (by ONNX Runtime's CPU provider).

    Args:
        path: of `targets_of`.
        data: whose validation images are used; categories have to be those that the detector knows.
        most: images, evenly spread; all by default.
        quiet: no progress bar.

    Raises:
        UserError: it is no detector, or one of other categories.
    """
    takes, find, run_by = _folder(path) if path.is_dir() else _file(path)
    _check_classes(path, takes.classes, data)
    seen: list[int] = []
    images = fitted(data.val, takes.preprocess, most)
    found = find(
        judge.noting(judge.watched_images(images, most or data.val.count, quiet), seen), data.category_ids, takes.limits
    )
    boxes = average_precision(data.val.annotations, found, seen)
    masks = average_precision(data.val.annotations, found, seen, "segm") if takes.masks and data.val.masks else None
    return Judged(str(path), run_by, boxes, masks, found)


def export(folder: Path, out: Path, shape: str, *, size: tuple[int, int] | None = None, uint8: bool = False) -> None:
    """Write a detector folder as ONNX in one of its shapes.

    Raises:
        UserError: there is no detector, the shape is unknown, or the file exists.
    """
    if out.exists():
        raise UserError(f"{out} exists.", why="Nothing is overwritten.", fix="Choose another -o.")
    detector, info = load_detector(folder)
    export_detector(detector, info, out, size or size_for(info.scale), shape=shape, uint8_input=uint8)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Takes:
    """What a detector takes and tells apart."""

    classes: tuple[str, ...]
    preprocess: Preprocess
    limits: Limits
    masks: bool = False


_Find = Callable[[Iterable[Fitted], Sequence[int], Limits], list[dict[str, Any]]]
"""From images, the category of every label, and limits to detections in COCO's result format."""


def _folder(path: Path) -> tuple[_Takes, _Find, str]:
    openmm.require()
    detector, info = load_detector(path)
    detector.to(pick_device("auto"))
    size = size_for(info.scale)
    takes = _Takes(info.classes, info.preprocess(size), limits_of(info.config), judge.has_masks(detector))
    return takes, partial(judge.found_by, detector, size), "PyTorch"


def _file(path: Path) -> tuple[_Takes, _Find, str]:
    model = load_model(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        shape, labels = metadata["shape"], json.loads(metadata["labels"])
        size, mean, std = (tuple(json.loads(metadata[name])) for name in ("input_size", "mean", "std"))
        preprocess = Preprocess(size, mean, std, "bilinear", 1.0, "border")
        limits = Limits(**json.loads(metadata["limits"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no detector of ours: its metadata lack {error}.",
            fix="Give a file of `detect train` or `detect export`.",
        ) from error
    kind = model.graph.input[0].type.tensor_type.elem_type
    if shape != "decode" or kind != TensorProto.FLOAT:
        raise UserError(
            f"{path} is not of the shape `decode` with normalised images.",
            fix="Export it so: `upvits-deploy detect export --shape decode`.",
        )
    return (
        _Takes(tuple(labels), preprocess, limits),
        partial(judge.detections, judge.by_session(open_model(model))),
        "ONNX Runtime",
    )


def _check_classes(path: Path, classes: tuple[str, ...], data: CocoData) -> None:
    if tuple(classes) != data.classes:
        differing = sorted({*classes} ^ {*data.classes})[:3] or ["their order"]
        raise UserError(
            f"{path} knows other categories than the data ({', '.join(differing)}).",
            why=f"It was trained on {len(classes)} categories; the data have {len(data.classes)}.",
            fix="Judge it on data with the categories that it was trained on.",
        )


def require_free(folder: Path, targets: Sequence[Path]) -> None:
    """Refuse a folder that holds results already, before hours of judging.

    Raises:
        UserError: a file is there.
    """
    there = [name for name in (*map(_file_name, targets), "ap.json") if (folder / name).exists()]
    if there:
        raise UserError(f"{folder / there[0]} exists.", why="Nothing is overwritten.", fix="Choose another -o.")


def _file_name(target: Path) -> str:
    return f"{'-'.join(target.parts[-2:])}.json"


def write(folder: Path, found: Sequence[Judged]) -> None:
    """Detections of each, in COCO's result format, and AP of all."""
    files = {_file_name(Path(one.name)): one for one in found}
    with disk_errors(folder, "eval"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, one in files.items():
            write_json(folder / name, one.found)
        figures = {one.name: {"run_by": one.run_by, **asdict(one.precision), "masks": _figures(one)} for one in found}
        write_json(folder / "ap.json", figures)


def _figures(one: Judged) -> dict[str, Any] | None:
    return asdict(one.masks) if one.masks else None
