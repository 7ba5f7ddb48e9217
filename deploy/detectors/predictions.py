"""Predictions of a detector, whoever runs it (PyTorch, mmdet or an engine), and whether two of them agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, FailFast, RootModel
from torch import nn
from torchvision.ops import box_iou

from upvits.calib_data import Preprocess
from upvits.calib_data.documents import Natural, Number, read_document
from upvits.calib_data.errors import GateError
from upvits.calib_data.progress import watched
from upvits.deploy.detectors.suppression import USUAL, Limits, limits_of, suppress
from upvits.deploy.report.detection import BoxAgreement
from upvits.deploy.runtimes import Session
from upvits.deploy.stages.job import write_json
from upvits.deploy.store.documents import AGAIN
from upvits.detection import openmm
from upvits.detection.average_precision import AveragePrecision, Kind, average_precision, run_length
from upvits.detection.coco import CocoData
from upvits.detection.decode import DecodedBoxes
from upvits.detection.detector import DetectorInfo
from upvits.detection.pictures import Fitted, fitted
from upvits.toolchain.scores.divergence import device_of

SAME_IOU, SAME_SCORE, SAME_SHARE = 0.99, 1e-3, 0.99
"""Two boxes are the same from this overlap on and up to this difference of scores; this share of all has to be."""

BATCH = 4
"""Images per call: a dozen would take gigabytes at 800 x 1344."""

_FILE = "predictions.json"

Detections = list[dict[str, Any]]
"""In COCO's result format."""

Candidates = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
"""Boxes [B, K, 4], scores [B, K] and labels [B, K] before suppression of overlaps."""

Run = Callable[[NDArray[np.float32]], Candidates]
"""From images [B, 3, H, W] to candidates."""


def by_session(session: Session) -> Run:
    """An engine of the `decode` shape."""

    def run(images: NDArray[np.float32]) -> Candidates:
        outputs = session.run({session.input_names[0]: images})
        return (
            np.asarray(outputs["boxes"], np.float32),
            np.asarray(outputs["scores"], np.float32),
            np.asarray(outputs["labels"], np.int64),
        )

    return run


def by_torch(decoded: nn.Module) -> Run:
    """`detection.decode.DecodedBoxes` itself."""
    device = device_of(decoded)

    def run(images: NDArray[np.float32]) -> Candidates:
        with torch.inference_mode():
            boxes, scores, labels = (out.cpu() for out in decoded(torch.from_numpy(images).to(device)))
        return boxes.numpy(), scores.numpy(), labels.numpy()

    return run


def by_mmdet(detector: nn.Module) -> Run:
    """mmdet's `predict`; overlapping boxes are suppressed already."""

    def run(images: NDArray[np.float32]) -> Candidates:
        with torch.inference_mode():
            predicted = openmm.predict(detector, torch.from_numpy(images).to(device_of(detector)))
        most = max((len(image_boxes) for image_boxes, _, _ in predicted), default=0)
        boxes = np.zeros((len(predicted), most, 4), np.float32)  # no area: `suppress` drops what is only padding
        scores, labels = np.zeros((len(predicted), most), np.float32), np.zeros((len(predicted), most), np.int64)
        for index, (image_boxes, image_scores, image_labels) in enumerate(predicted):
            count = len(image_boxes)
            boxes[index, :count], scores[index, :count] = image_boxes.numpy(), image_scores.numpy()
            labels[index, :count] = image_labels.numpy()
        return boxes, scores, labels

    return run


@dataclass(frozen=True, slots=True)
class Predictor:
    """A detector that is ready to run.

    Attributes:
        run_by: PyTorch, or ONNX Runtime.
        classes: in the order of labels.
        preprocess: how images are made ready for it.
        detect: from images and the category of every label to detections.
        has_masks: whether detections have masks, too.
    """

    run_by: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    detect: Callable[[Iterable[Fitted], Sequence[int]], Detections]
    has_masks: bool = False


def in_pytorch(detector: nn.Module, info: DetectorInfo, size: tuple[int, int]) -> Predictor:
    """A detector in PyTorch on images of `size` (height, width).

    RetinaNet's boxes are decoded as in its graph; those of Mask R-CNN are mmdet's and come with masks.
    """
    if info.has_masks:
        detect = partial(_boxes_and_masks, detector)
    else:
        detect = partial(_boxes, by_torch(DecodedBoxes(detector, size).eval()), limits_of(info.config))
    return Predictor("PyTorch", info.classes, info.preprocess(size), detect, info.has_masks)


def in_session(session: Session, classes: tuple[str, ...], preprocess: Preprocess, limits: Limits) -> Predictor:
    """An engine or ONNX file of the `decode` shape."""
    return Predictor("ONNX Runtime", classes, preprocess, partial(_boxes, by_session(session), limits))


def _boxes(run: Run, limits: Limits, images: Iterable[Fitted], category_ids: Sequence[int]) -> Detections:
    """Boxes on images after suppression of overlaps."""
    detections = []
    for batch in batched(images, BATCH):
        for image, (boxes, scores, labels) in zip(batch, _suppressed(run(stacked(batch)), limits), strict=True):
            for (x1, y1, x2, y2), score, label in zip(
                image.boxes_back(boxes).tolist(), scores.tolist(), labels.tolist(), strict=True
            ):
                if x2 <= x1 or y2 <= y1:  # in the padding
                    continue
                detections.append({
                    "image_id": image.image_id, "category_id": category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score,
                })  # fmt: skip
    return detections


def _boxes_and_masks(detector: nn.Module, images: Iterable[Fitted], category_ids: Sequence[int]) -> Detections:
    return [detection for image in images for detection in _instances(detector, image, category_ids)]


def _instances(detector: nn.Module, image: Fitted, category_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Boxes with masks on one image."""
    (width, height), (right, below) = image.original, image.inside
    with torch.inference_mode():
        pixels = image.pixels.to(device_of(detector))
        instances = openmm.predict_masks(detector, pixels, (below, right), (height, width), image.scale)
    for (x1, y1, x2, y2), mask, score, label in zip(
        instances.boxes.tolist(), instances.masks.numpy(), instances.scores.tolist(), instances.labels.tolist(),
        strict=True,
    ):  # fmt: skip
        yield {
            "image_id": image.image_id, "category_id": category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": run_length(mask), "score": score,
        }  # fmt: skip


def batched(images: Iterable[Fitted], size: int) -> Iterator[list[Fitted]]:
    """Images in lists of `size`; the last one may be shorter."""
    batch: list[Fitted] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def stacked(images: Sequence[Fitted]) -> NDArray[np.float32]:
    """Images as one array [B, 3, H, W]."""
    return np.stack([image.pixels.numpy() for image in images])


@dataclass(frozen=True, slots=True)
class Predictions:
    """Detections, and the ids of all images that the detector saw, also of those without any."""

    detections: Detections
    image_ids: tuple[int, ...]

    def ap(self, data: CocoData, kind: Kind = "bbox") -> AveragePrecision:
        """AP on these validation images."""
        return average_precision(data.val.annotations, self.detections, self.image_ids, kind)

    def save(self, folder: Path) -> None:
        """Write the detections into a folder."""
        write_json(folder / _FILE, self.detections)


class _Mask(BaseModel):
    size: tuple[Natural, Natural]
    counts: str


class _DetectionEntry(BaseModel):
    """One detection in COCO's result format."""

    image_id: int
    category_id: int
    bbox: tuple[Number, Number, Number, Number]
    score: Number
    segmentation: _Mask | None = None


class _DetectionList(RootModel[list[_DetectionEntry]]):
    """`predictions.json`."""

    root: Annotated[list[_DetectionEntry], FailFast()]  # within the brackets above, it has to be hashable


def read_detections(folder: Path) -> Detections:
    """Detections that `Predictions.save` wrote."""
    read = read_document(folder / _FILE, _DetectionList, fix=AGAIN, largest=2 << 30, plain=False)
    return [entry.model_dump(mode="json", exclude_none=True) for entry in read.root]


def predict(
    predictor: Predictor,
    data: CocoData,
    most: int | None = None,
    *,
    upright: bool | None = None,
    quiet: bool = True,
) -> Predictions:
    """Run a detector on validation images. Args: `most` and `upright` as of `detection.pictures.fitted`."""
    image_ids: list[int] = []

    def images() -> Iterator[Fitted]:
        for image in fitted(data.val, predictor.preprocess, most, upright=upright):
            image_ids.append(image.image_id)
            yield image

    total = min(most or data.val.count, data.val.count)
    detections = predictor.detect(watched(images(), "judging", quiet=quiet, total=total), data.category_ids)
    return Predictions(detections, tuple(image_ids))


def agreement(first: Run, second: Run, images: Iterable[Fitted], limits: Limits = USUAL) -> BoxAgreement:
    """Match the boxes of two detectors on the same images: how many of the first one's the second one has, too."""
    count, matched, worst = 0, 0, 0.0
    for batch in batched(images, BATCH):
        pixels = stacked(batch)
        for (boxes, scores, labels), (other_boxes, other_scores, other_labels) in zip(
            _suppressed(first(pixels), limits), _suppressed(second(pixels), limits), strict=True
        ):
            count += len(boxes)
            if not len(boxes) or not len(other_boxes):
                continue
            overlap = box_iou(torch.from_numpy(boxes), torch.from_numpy(other_boxes)).numpy()
            overlap[labels[:, None] != other_labels[None]] = 0
            partner = overlap.argmax(axis=1)
            same = overlap.max(axis=1) >= SAME_IOU
            matched += int(same.sum())
            gaps = np.abs(scores - other_scores[partner])[same]
            worst = max(worst, float(gaps.max(initial=0.0)))
    return BoxAgreement(boxes=count, matched=matched, max_score_difference=worst)


def _suppressed(candidates: Candidates, limits: Limits) -> list[Candidates]:
    """Boxes [K, 4], scores [K] and labels [K] of each image after suppression of overlaps."""
    return [suppress(*image, limits) for image in zip(*candidates, strict=True)]


def require_agreement(agreed: BoxAgreement) -> None:
    """The gate between PyTorch and an exported file.

    Raises:
        GateError: the exported detector finds other boxes than mmdet.
    """
    if agreed.matched < SAME_SHARE * agreed.boxes or agreed.max_score_difference > SAME_SCORE:
        raise GateError(
            f"The exported detector finds {agreed.matched} of {agreed.boxes} boxes, scores differ by up to "
            f"{agreed.max_score_difference:.2g}.",
            why=f"{SAME_SHARE:.0%} of mmdet's boxes have to be found, with IoU >= {SAME_IOU} and scores within "
            f"{SAME_SCORE:g}.",
            fix="Please report it, with the data if they may be seen.",
        )
