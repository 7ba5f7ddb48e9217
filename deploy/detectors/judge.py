"""What a detector finds, in COCO's result format, whoever runs it; and whether two of them find the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.ops import box_iou

from upvits.calib_data.errors import GateError
from upvits.calib_data.progress import watched
from upvits.deploy.detectors.suppression import USUAL, Limits, suppress
from upvits.deploy.runtimes import Session
from upvits.detection import openmm
from upvits.detection.average_precision import run_length
from upvits.detection.decode import DecodedBoxes
from upvits.detection.pictures import Fitted
from upvits.toolchain.scores.divergence import device_of

SAME_IOU, SAME_SCORE, SAME_SHARE = 0.99, 1e-3, 0.99
"""Two boxes are the same from this overlap on and up to this difference of scores; so many have to be."""

PREDICTIONS = "predictions.json"

Found = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
"""Boxes [B, K, 4], scores [B, K] and labels [B, K], overlapping ones among them."""

Run = Callable[[NDArray[np.float32]], Found]
"""From images [B, 3, H, W] to what is found on them."""


def by_session(session: Session) -> Run:
    """An engine of the `decode` shape."""

    def run(images: NDArray[np.float32]) -> Found:
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

    def run(images: NDArray[np.float32]) -> Found:
        with torch.inference_mode():
            boxes, scores, labels = (out.cpu() for out in decoded(torch.from_numpy(images).to(device)))
        return boxes.numpy(), scores.numpy(), labels.numpy()

    return run


def by_mmdet(detector: nn.Module) -> Run:
    """mmdet's own `predict`; overlapping boxes are suppressed already."""

    def run(images: NDArray[np.float32]) -> Found:
        with torch.inference_mode():
            found = openmm.predict(detector, torch.from_numpy(images).to(device_of(detector)))
        most = max((len(boxes) for boxes, _, _ in found), default=0)
        boxes = np.zeros((len(found), most, 4), np.float32)  # no area: `suppress` drops what is only padding
        scores, labels = np.zeros((len(found), most), np.float32), np.zeros((len(found), most), np.int64)
        for index, own in enumerate(found):
            boxes[index, : len(own[0])], scores[index, : len(own[1])] = own[0].numpy(), own[1].numpy()
            labels[index, : len(own[2])] = own[2].numpy()
        return boxes, scores, labels

    return run


BATCH = 4
"""Images per call: a dozen would take gigabytes at 800 x 1344."""


def detections(
    run: Run, images: Iterable[Fitted], category_ids: Sequence[int], limits: Limits = USUAL
) -> list[dict[str, Any]]:
    """Everything that a detector finds on images, with overlaps suppressed, in COCO's result format.

    Args:
        run: the detector.
        images: as `detection.pictures` makes them.
        category_ids: of every label.
        limits: which boxes stay.
    """
    result = []
    for batch in batched(images, BATCH):
        found = run(np.stack([one.pixels.numpy() for one in batch]))
        for image, boxes, scores, labels in zip(batch, *found, strict=True):
            own, sure, kind = suppress(boxes, scores, labels, limits)
            for (x1, y1, x2, y2), score, label in zip(
                image.boxes_back(own).tolist(), sure.tolist(), kind.tolist(), strict=True
            ):
                if x2 <= x1 or y2 <= y1:  # on what the picture does not cover
                    continue
                result.append({
                    "image_id": image.image_id, "category_id": category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score,
                })  # fmt: skip
    return result


def has_masks(detector: nn.Module) -> bool:
    """Whether it finds masks, too."""
    return type(detector).__name__ == "MaskRCNN"


def found_by(
    detector: nn.Module,
    size: tuple[int, int],
    images: Iterable[Fitted],
    category_ids: Sequence[int],
    limits: Limits = USUAL,
) -> list[dict[str, Any]]:
    """Everything that a detector in PyTorch finds, in COCO's result format: RetinaNet's boxes are decoded as its graph
    does it; those of Mask R-CNN are mmdet's own and come with masks.

    Args:
        detector: of `detection.detector.load_detector`.
        size: (height, width) of the images.
        images: as `detection.pictures` makes them.
        category_ids: of every label.
        limits: which boxes of a RetinaNet stay.
    """
    if has_masks(detector):
        return [found for image in images for found in _with_masks(detector, image, category_ids)]
    return detections(by_torch(DecodedBoxes(detector, size).eval()), images, category_ids, limits)


def _with_masks(detector: nn.Module, image: Fitted, category_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    (width, height), (right, below) = image.original, image.inside
    with torch.inference_mode():
        pixels = image.pixels.to(device_of(detector))
        found = openmm.predict_masks(detector, pixels, (below, right), (height, width), image.scale)
    for (x1, y1, x2, y2), mask, score, label in zip(
        found.boxes.tolist(), found.masks.numpy(), found.scores.tolist(), found.labels.tolist(), strict=True
    ):
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


def watched_images(images: Iterable[Fitted], total: int, quiet: bool) -> Iterable[Fitted]:
    """The same images with a progress bar."""
    return watched(images, "judging", quiet=quiet, total=total)


def noting(images: Iterable[Fitted], seen: list[int]) -> Iterator[Fitted]:
    """The same images; the id of each is added to `seen` as it passes."""
    for image in images:
        seen.append(image.image_id)
        yield image


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Detections that were written in COCO's result format."""
    found: list[dict[str, Any]] = json.loads((folder / PREDICTIONS).read_text())
    return found


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well two detectors agree on the same images.

    Attributes:
        boxes: that the first one found, above the score threshold and after suppression.
        matched: of them, those with a box of the same class in the second one's, IoU >= 0.99.
        max_score_difference: over the matched ones.
    """

    boxes: int
    matched: int
    max_score_difference: float

    def require(self) -> None:
        """The gate.

        Raises:
            GateError: an exported detector finds other boxes than mmdet.
        """
        if self.matched < SAME_SHARE * self.boxes or self.max_score_difference > SAME_SCORE:
            raise GateError(
                f"The exported detector finds {self.matched} of {self.boxes} boxes, scores differ by up to "
                f"{self.max_score_difference:.2g}.",
                why=f"{SAME_SHARE:.0%} of mmdet's own boxes are wanted, with IoU >= {SAME_IOU} and scores within "
                f"{SAME_SCORE:g}.",
                fix="Please report it, with the data if they may be seen.",
            )


def agreement(first: Run, second: Run, images: Iterable[Fitted], limits: Limits = USUAL) -> Agreement:
    """Match what two detectors find on images box by box."""
    count, matched, worst = 0, 0, 0.0
    fed = (np.stack([one.pixels.numpy() for one in batch]) for batch in batched(images, BATCH))
    for one, other in (
        pair
        for batch in fed
        for pair in zip(_single(first(batch), limits), _single(second(batch), limits), strict=True)
    ):
        count += len(one[0])
        if not len(one[0]) or not len(other[0]):
            continue
        overlap = box_iou(torch.from_numpy(one[0]), torch.from_numpy(other[0])).numpy()
        overlap[one[2][:, None] != other[2][None]] = 0
        partner = overlap.argmax(axis=1)
        same = overlap.max(axis=1) >= SAME_IOU
        matched += int(same.sum())
        gaps = np.abs(one[1] - other[1][partner])[same]
        worst = max(worst, float(gaps.max(initial=0.0)))
    return Agreement(count, matched, worst)


def _single(found: Found, limits: Limits) -> list[Found]:
    return [suppress(*own, limits) for own in zip(*found, strict=True)]
