"""AP of a detector in a folder, by PyTorch; its ONNX file, and whether the file finds the same boxes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from upvits.deploy.detectors.documents import DetectorRecord
from upvits.deploy.detectors.export import export_detector
from upvits.deploy.detectors.predictions import (
    Predictions,
    agreement,
    by_mmdet,
    by_session,
    in_pytorch,
    predict,
    require_agreement,
)
from upvits.deploy.detectors.suppression import limits_of
from upvits.deploy.graphs.files import load_model
from upvits.deploy.report.detection import BoxAgreement
from upvits.deploy.runtimes import open_model
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import load_document, save_document
from upvits.detection.average_precision import AveragePrecision
from upvits.detection.coco import CocoData
from upvits.detection.decode import Levels
from upvits.detection.detector import DetectorInfo, load_detector
from upvits.detection.pictures import Fitted, fitted
from upvits.toolchain.processes.process import pick_device
from upvits.toolchain.structure.macs import count_macs, count_params

_RECORD = "ap.json"
_AGREEMENT_IMAGES = 16
"""Images on which the exported detector is held against PyTorch, box by box."""
_PUBLISHED_SIZE = (800, 1344)
"""(height, width) at which published tables count MACs."""


def judge_detector(
    folder: Path, data: CocoData, size: tuple[int, int], *, export: bool = True, quiet: bool = True
) -> None:
    """Judge `detector/` of a folder; writes `ap.json`, `predictions.json` and, where it has a graph, `model.onnx`.

    Args:
        folder: of a stage.
        data: on whose validation images AP is measured.
        size: (height, width) of the images in pixels, and of the graph's input.
        export: write the ONNX file.
        quiet: no progress bar.

    Raises:
        GateError: the ONNX file finds other boxes than mmdet.
    """
    detector, info = load_detector(folder / "detector")
    detector.to(pick_device("auto"))
    has_graph = not info.has_masks
    agreed = None
    if has_graph and export:
        export_detector(detector, info, folder / "model.onnx", size)
        some = fitted(data.val, info.preprocess(size), _AGREEMENT_IMAGES)
        agreed = _agreement(folder / "model.onnx", detector, info, some)
    predictions = predict(in_pytorch(detector, info, size), data, quiet=quiet)
    predictions.save(folder)
    record = DetectorRecord(
        size=size,
        pytorch=predictions.ap(data),
        turned=_turned(detector, info, data, size, predictions) if has_graph and size[0] < size[1] else None,
        masks=predictions.ap(data, "segm") if info.has_masks else None,
        params=count_params(detector),
        backbone_params=count_params(detector.get_submodule("backbone")),
        macs=count_macs(Levels(detector), (3, *size)) if has_graph else None,
        macs_800x1344=count_macs(Levels(detector), (3, *_PUBLISHED_SIZE)) if has_graph else None,
        agreement=agreed,
    )
    save_document(folder / _RECORD, record)


def read_record(artifact: Artifact) -> DetectorRecord:
    """`ap.json` of a detector's stage."""
    return load_document(artifact.folder / _RECORD, DetectorRecord)


def _agreement(path: Path, detector: nn.Module, info: DetectorInfo, images: Iterable[Fitted]) -> BoxAgreement:
    """How the exported file agrees with mmdet's `predict`.

    Raises:
        GateError: too little.
    """
    in_fp32 = copy.deepcopy(detector).cpu()  # GPUs may round convolutions to TF32
    with open_model(load_model(path)) as session:
        agreed = agreement(by_mmdet(in_fp32), by_session(session), images, limits_of(info.config))
    require_agreement(agreed)
    return agreed


def _turned(
    detector: nn.Module, info: DetectorInfo, data: CocoData, size: tuple[int, int], predictions: Predictions
) -> AveragePrecision:
    """AP where upright images are fitted into the turned size, as in published tables; no graph of one size does that.

    For all other images `predictions`, made at `size`, are taken.
    """
    upright = predict(in_pytorch(detector, info, (size[1], size[0])), data, upright=True)
    ids = set(upright.image_ids)
    others = [detection for detection in predictions.detections if detection["image_id"] not in ids]
    return Predictions([*others, *upright.detections], predictions.image_ids).ap(data)
