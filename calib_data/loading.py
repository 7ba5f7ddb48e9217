"""From pictures to batches: timm's transforms, in an order and with random changes fixed by seed and epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upvits.calib_data.datasets import DataSource, Images
from upvits.calib_data.prepared import PreparedImages

Transform = Callable[[Image.Image], Tensor]

_MIN_CROP_SCALE = 0.5
"""Smallest share of the picture in a training crop. ImageNet's 0.08 is for training from scratch, not fine-tuning."""

NORMALISATIONS = {
    "ImageNet's mean and deviation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean and deviation 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's mean and deviation": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "no normalisation": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and deviation that networks are usually trained with, by name: what is tried where accuracy is poor."""

SIZES = (32, 64, 128, 224, 384)
"""Pixels of a side, likewise."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a model wants its pictures; the fields are those of timm's pretrained configuration.

    Attributes:
        input_size: (channels, height, width).
        mean: per channel, for pixels in 0..1.
        std: per channel, for pixels in 0..1.
        interpolation: "bilinear", "bicubic", ...
        crop_pct: share of the resized shorter side that the central crop keeps.
        crop_mode: "center", "squash" or "border".
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def eval_transform(self) -> Transform:
        """timm's evaluation transform: PIL image to float32 [3, H, W], normalised."""
        return cast(
            Transform,
            create_transform(
                self.input_size,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                crop_pct=self.crop_pct,
                crop_mode=self.crop_mode,
            ),
        )

    def train_transform(self) -> Transform:
        """timm's random resized crop and horizontal flip: PIL image to float32 [3, H, W], normalised."""
        return cast(
            Transform,
            create_transform(
                self.input_size,
                is_training=True,
                scale=(_MIN_CROP_SCALE, 1.0),
                color_jitter=0.0,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
            ),
        )


def raw_pixels(images: Tensor, preprocess: Preprocess) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Normalised images [B, 3, H, W] as the pixels that they were, uint8 [B, H, W, 3]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return np.asarray(pixels.contiguous().numpy())


class _Prepared(Dataset[tuple[Tensor, int]]):
    """Transformed pictures. With a `seed`, each one's random changes depend on (seed, index) alone."""

    def __init__(self, images: Dataset[tuple[Image.Image, int]], transform: Transform, seed: int | None) -> None:
        self._images, self._transform, self._seed = images, transform, seed

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        if self._seed is None:
            return self._transform(image), label
        # timm's transforms draw from Python's and torch's global generators: seed both, and put them back.
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            own = stream(self._seed, index)
            random.seed(own)
            torch.default_generator.manual_seed(own)
            tensor = self._transform(image)
        random.setstate(state)
        return tensor, label


def batches(
    dataset: Images,
    preprocess: Preprocess,
    batch_size: int,
    *,
    train: bool = False,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    skip: int = 0,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches (images [B, 3, H, W] float32, labels [B] int64).

    For evaluation all pictures in order. With `train`, random crops and flips in a random order, without the last
    incomplete batch (unless it is the only one); the same (seed, epoch) gives the same batches whatever the number of
    workers, so that a continued run sees what the uninterrupted one would have seen.

    Args:
        dataset: the pictures.
        preprocess: how they are prepared.
        batch_size: pictures of a batch, over all processes.
        train: whether they are trained on.
        seed: decides order and changes, with `epoch`.
        epoch: its number.
        workers: processes that read.
        share: (rank, processes) of the process that asks. Of every training batch it gets its part, B / processes
            pictures; of the evaluation's batches, every so-many-th.
        skip: so many training batches were seen already.
    """
    generator = torch.Generator().manual_seed(stream(seed, epoch))
    if train:
        order, batch_size = _share_of_epoch(
            torch.randperm(len(dataset), generator=generator).tolist(), batch_size, share, skip
        )
    else:
        rank, processes = share
        starts = range(rank * batch_size, len(dataset), processes * batch_size)
        order = [index for start in starts for index in range(start, min(start + batch_size, len(dataset)))]
    transform = preprocess.train_transform() if train else preprocess.eval_transform()
    return DataLoader(
        _Prepared(dataset, transform, stream(seed, epoch) if train else None),
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        generator=generator,  # otherwise the loader takes a number from the global generator
    )


def _share_of_epoch(order: list[int], batch_size: int, share: tuple[int, int], skip: int) -> tuple[list[int], int]:
    """One process's pictures of the whole batches of an epoch, in order, and how many of them make a step."""
    rank, processes = share
    batch_size = min(batch_size, len(order))
    part = batch_size // processes
    starts = range(skip * batch_size, len(order) - batch_size + 1, batch_size) if part else ()
    return [i for start in starts for i in order[start + rank * part : start + (rank + 1) * part]], max(part, 1)


def proxy_images(source: DataSource, preprocess: Preprocess, num_images: int, seed: int) -> PreparedImages:
    """The pictures of `proxy_set` at evaluation transforms, [N, 3, H, W], each read when it is needed."""
    chosen = proxy_set(source, num_images, seed)
    return PreparedImages(chosen, preprocess.eval_transform(), preprocess.input_size)


def proxy_set(source: DataSource, num_images: int, seed: int) -> Images:
    """`num_images` random training pictures; all when there are fewer.

    Classes take turns, so that their numbers differ by one at most as long as each has enough pictures
    (the proxy set of UP-ViTs, arXiv 2111.15127: random training images, evenly over the classes).
    """
    generator = torch.Generator().manual_seed(stream(seed, 0))
    turns: dict[int, int] = {}
    ranked: list[tuple[int, int]] = []
    for position, index in enumerate(torch.randperm(len(source.train), generator=generator).tolist()):
        label = source.train.labels[index]
        turn = position if label < 0 else turns.get(label, 0)
        turns[label] = turn + 1
        ranked.append((turn, index))
    ranked.sort(key=lambda pair: pair[0])  # stable: within a turn the random order stays
    chosen = [index for _, index in ranked[:num_images]]
    return Images([source.train.labels[index] for index in chosen], lambda i: source.train[chosen[i]][0])


def stream(seed: int, number: int) -> int:
    """A seed for one epoch, batch or other part of what is drawn; those of consecutive seeds and numbers don't meet."""
    return random.Random(f"{seed}/{number}").getrandbits(63)
