"""Images of one fixed size, as exported detectors take them: scaled to fit, padded at the right and at the bottom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from upvits.calib_data import Preprocess
from upvits.calib_data.decoding import open_image
from upvits.detection.coco import Split, read_annotations


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """An image as a detector takes it, and what brings boxes back into the original.

    Attributes:
        image_id: in the annotations.
        pixels: [3, H, W] float32, RGB, normalised; zero where the image does not reach.
        scale: pixels of the fitted image per pixel of the original, (x, y).
        inside: width and height that the image covers.
        original: width and height of the original.
    """

    image_id: int
    pixels: Tensor
    scale: tuple[float, float]
    inside: tuple[int, int]
    original: tuple[int, int]

    def boxes_back(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes [K, 4] (x1, y1, x2, y2) in pixels of the original, clipped to it."""
        limits, scale = (np.array([*pair, *pair], np.float32) for pair in (self.inside, self.scale))
        return (np.clip(boxes, 0, limits) / scale).astype(np.float32)


def fit(image: Image.Image, image_id: int, preprocess: Preprocess) -> Fitted:
    """Scale an image (bilinear, aspect kept) to fit into the input size, normalise it, and pad it with zeros."""
    _, height, width = preprocess.input_size
    ratio = min(width / image.width, height / image.height)
    inside = (max(1, int(image.width * ratio + 0.5)), max(1, int(image.height * ratio + 0.5)))
    scaled = (
        image.convert("RGB") if inside == image.size else image.convert("RGB").resize(inside, Image.Resampling.BILINEAR)
    )
    pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float()
    mean, std = (torch.tensor([255 * v for v in values]).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    padded = torch.zeros(3, height, width)
    padded[:, : inside[1], : inside[0]] = (pixels - mean) / std
    scale = (inside[0] / image.width, inside[1] / image.height)
    return Fitted(image_id, padded, scale, inside, image.size)


def fitted(
    split: Split, preprocess: Preprocess, most: int | None = None, *, upright: bool | None = None
) -> Iterator[Fitted]:
    """The images of a split, in the order of its annotations.

    Args:
        split: whose images are read, one at a time.
        preprocess: of the detector (`DetectorInfo.preprocess`).
        most: at most so many images, evenly spread; None for all.
        upright: only images that are higher than wide, or only the others; None for all.
    """
    entries = read_annotations(split.annotations).images
    if upright is not None:
        entries = [entry for entry in entries if (entry.height > entry.width) == upright]
    count = min(most or len(entries), len(entries))
    for entry in (entries[index * len(entries) // count] for index in range(count)):
        with open_image(split.images / entry.file_name) as image:
            prepared = fit(image, entry.id, preprocess)
        yield prepared
