"""Average precision as COCO defines it, of detections from anywhere: PyTorch or an engine."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.installation import install_line
from upvits.detection.coco import read_annotations

Detection = Mapping[str, Any]
"""In COCO's result format: image_id, category_id, score, and bbox [x, y, width, height] in pixels or segmentation."""

Kind = Literal["bbox", "segm"]


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """AP in [0, 1] over IoU 0.5 to 0.95, at 0.5 and 0.75, and by area; None where no annotated box is of that kind.

    Attributes:
        per_class: category name -> AP.
        images: that were judged.
        detections: on them, all of them, also beyond the 100 of an image that count.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: dict[str, float | None]
    images: int
    detections: int


def average_precision(
    annotations: Path, detections: Sequence[Detection], image_ids: Collection[int] | None = None, kind: Kind = "bbox"
) -> AveragePrecision:
    """Judge boxes (or masks) on all images of an annotation file, or on some; at most the best 100 of an image count.

    The file has areas, crowd marks, and boxes numbered from 1, as `detection.coco` writes them: pycocotools takes a
    match with the box 0 for none.

    Raises:
        MissingDependencyError: pycocotools is not there.
        UserError: a detection is on an image that the file does not list.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingDependencyError(
            "AP needs pycocotools.", why="It is optional.", fix=f"Run: {install_line('detection')}"
        ) from error
    document = read_annotations(annotations).model_dump(mode="json", exclude_none=True)
    known = {image["id"] for image in document["images"]}
    if image_ids is not None:
        known &= {*image_ids}
    unlisted = {detection["image_id"] for detection in detections} - known
    if unlisted:
        raise UserError(
            f"There are detections on {len(unlisted)} images that {annotations} does not list.",
            fix="Judge detections by the annotations of the images that they were made on.",
        )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()
        # pycocotools takes sizes of masks from boxes where both are given
        left_out = "segmentation" if kind == "bbox" else "bbox"
        judged = [{key: value for key, value in box.items() if key != left_out} for box in detections]
        evaluation = COCOeval(truth, truth.loadRes(judged) if judged else _empty(truth), kind)
        evaluation.params.imgIds = sorted(known)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [None if value < 0 else float(value) for value in evaluation.stats[:6]]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class] over all areas, 100 boxes
    names = {category["id"]: category["name"] for category in document["categories"]}
    per_class = {}
    for index, category in enumerate(evaluation.params.catIds):
        defined = precision[:, :, index][precision[:, :, index] > -1]
        per_class[names[category]] = float(np.mean(defined)) if defined.size else None
    return AveragePrecision(
        ap=values[0] or 0.0,
        ap50=values[1] or 0.0,
        ap75=values[2] or 0.0,
        ap_small=values[3],
        ap_medium=values[4],
        ap_large=values[5],
        per_class=per_class,
        images=len(known),
        detections=len(detections),
    )


def run_length(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask [h, w] as COCO's result format has it."""
    from pycocotools import mask as coder

    runs: dict[str, Any] = coder.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")}


def _empty(truth: Any) -> Any:
    """Results without any detection, which `loadRes` refuses."""
    result = copy.copy(truth)
    result.dataset = {**truth.dataset, "annotations": []}
    result.createIndex()
    return result
