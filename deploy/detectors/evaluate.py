"""Judging detectors wherever they are: in a run, in a folder, or in an exported file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from onnx import TensorProto
from pydantic import BaseModel, Field

from upvits.calib_data import Preprocess
from upvits.calib_data.documents import Name, Number, parse_document, parse_json
from upvits.calib_data.errors import UserError
from upvits.deploy.detectors.flow import read_detect_recipe
from upvits.deploy.detectors.predictions import Detections, Predictor, in_pytorch, in_session, predict
from upvits.deploy.detectors.suppression import Limits
from upvits.deploy.detectors.train_stage import DETECT
from upvits.deploy.graphs.files import load_model
from upvits.deploy.recipe.detect import size_for
from upvits.deploy.runtimes import open_model
from upvits.deploy.stages.job import write_json
from upvits.deploy.store.disk import disk_errors
from upvits.detection import openmm
from upvits.detection.average_precision import AveragePrecision
from upvits.detection.coco import CocoData
from upvits.detection.detector import load_detector
from upvits.toolchain.processes.process import pick_device

_Side = Annotated[int, Field(ge=1, le=16_384)]
_Spread = Annotated[float, Field(ge=1e-6, le=1e6)]
_OURS = "Give a file of `detect train` or `detect export`."


class _MetadataEntries(BaseModel):
    """What is read of the metadata of an exported detector."""

    labels: tuple[Name, ...]
    input_size: tuple[Literal[3], _Side, _Side]
    mean: tuple[Number, Number, Number]
    std: tuple[_Spread, _Spread, _Spread]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Judged:
    """A detector on validation images.

    Attributes:
        name: the folder or file.
        run_by: PyTorch or ONNX Runtime.
        boxes: their AP.
        masks: their AP, where the detector finds masks and the data have some.
        detections: on all images.
    """

    name: str
    run_by: str
    boxes: AveragePrecision
    masks: AveragePrecision | None
    detections: Detections

    @property
    def file_name(self) -> str:
        """Of the detections where they are written."""
        return _file_name(Path(self.name))


def targets_of(path: Path) -> list[Path]:
    """Detector folders and ONNX files that a path names: itself, or all of a run.

    Raises:
        UserError: there are none.
    """
    if path.is_file() or (path / "detector.json").is_file():
        return [path]
    places = [path / DETECT / name / part for name in ("dense", "pruned") for part in ("detector", "model.onnx")]
    targets = [place for place in places if place.exists()]
    if not targets:
        raise UserError(
            f"{path} holds no detector.",
            why="Looked for detector.json, and for detectors in 7-detect of a run.",
            fix="Give a run after `upvits-deploy detect train`, a detector folder, or an exported ONNX file.",
        )
    return targets


def coco_of(path: Path) -> str:
    """The data that the detectors of a run were trained on; the demo for anything else."""
    recipe = read_detect_recipe(path)
    return "demo" if recipe is None else recipe.coco


def evaluate(path: Path, data: CocoData, most: int | None = None, *, quiet: bool = True) -> Judged:
    """AP of a detector folder (by PyTorch) or of an exported ONNX file (by ONNX Runtime's CPU provider).

    Args:
        path: of `targets_of`.
        data: whose validation images are used; categories have to be those that the detector knows.
        most: at most so many images, evenly spread; None for all.
        quiet: no progress bar.

    Raises:
        UserError: the path holds no detector, or the detector knows other categories.
    """
    predictor = _in_folder(path) if path.is_dir() else _in_file(path)
    _check_classes(path, predictor.classes, data)
    predictions = predict(predictor, data, most, quiet=quiet)
    masks = predictions.ap(data, "segm") if predictor.has_masks and data.val.masks else None
    return Judged(str(path), predictor.run_by, predictions.ap(data), masks, predictions.detections)


def _in_folder(path: Path) -> Predictor:
    openmm.require()
    detector, info = load_detector(path)
    return in_pytorch(detector.to(pick_device("auto")), info, size_for(info.scale))


def _in_file(path: Path) -> Predictor:
    model = load_model(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    lacking = [name for name in ("shape", *_MetadataEntries.model_fields) if name not in metadata]
    if lacking:
        raise UserError(f"{path} is no detector of ours: its metadata lack {', '.join(lacking)}.", fix=_OURS)
    values = {name: parse_json(metadata[name], f"{path}: {name} in its metadata", fix=_OURS)
              for name in _MetadataEntries.model_fields}  # fmt: skip
    told = parse_document(json.dumps(values), f"The metadata of {path}", _MetadataEntries, fix=_OURS)
    kind = model.graph.input[0].type.tensor_type.elem_type
    if metadata["shape"] != "decode" or kind != TensorProto.FLOAT:
        raise UserError(
            f"{path} is not of the shape `decode` with normalised images.",
            fix="Export it so: `upvits-deploy detect export --shape decode`.",
        )
    preprocess = Preprocess(told.input_size, told.mean, told.std, "bilinear", 1.0, "border")
    return in_session(open_model(model), told.labels, preprocess, told.limits)


def _check_classes(path: Path, classes: tuple[str, ...], data: CocoData) -> None:
    if classes != data.classes:
        differing = sorted({*classes} ^ {*data.classes})[:3] or ["their order"]
        raise UserError(
            f"{path} knows other categories than the data ({', '.join(differing)}).",
            why=f"It was trained on {len(classes)} categories; the data have {len(data.classes)}.",
            fix="Judge it on data with the categories that it was trained on.",
        )


def require_free(folder: Path, targets: Sequence[Path]) -> None:
    """Refuse a folder that holds results already, before hours of judging.

    Raises:
        UserError: a file exists.
    """
    for name in (*map(_file_name, targets), "ap.json"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists.", why="Nothing is overwritten.", fix="Choose another -o.")


def _file_name(target: Path) -> str:
    return f"{'-'.join(target.parts[-2:])}.json"


def write(folder: Path, judged: Sequence[Judged]) -> None:
    """Write the detections of each detector in COCO's result format, and AP of all."""
    with disk_errors(folder, "eval"):
        folder.mkdir(parents=True, exist_ok=True)
        for detector in judged:
            write_json(folder / detector.file_name, detector.detections)
        write_json(folder / "ap.json", figures_of(judged))


def figures_of(judged: Sequence[Judged]) -> dict[str, Any]:
    """AP of all detectors by name, as plain values."""
    return {
        detector.name: {
            "run_by": detector.run_by,
            **asdict(detector.boxes),
            "masks": None if detector.masks is None else asdict(detector.masks),
        }
        for detector in judged
    }
