"""From pictures to batches: timm's transforms, in an order and with random changes fixed by seed and epoch."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from upvits.calib_data.datasets import SHUFFLE_BUFFER, DataSource, Images
from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import PreparedImages

Transform = Callable[[Image.Image], Tensor]
Samples = list[tuple[Tensor, int]]
Batches = Iterator[tuple[Tensor, Tensor]]

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
class Augmentation:
    """What is changed at random in a training picture, beside a horizontal flip.

    Attributes:
        min_crop: smallest share of the picture in a crop. ImageNet's 0.08 is for training from scratch.
        auto_augment: a policy in timm's words, such as `rand-m9-mstd0.5-inc1` or `3a`; "none".
        color_jitter: largest change of brightness, contrast and saturation. Policies other than `3a` have their own.
        views: how often a picture comes in an epoch, each time changed in another way; one in so many pictures comes
            then (repeated augmentation, arXiv 1902.05509).

    Raises:
        UserError: a value is out of range, or timm has no such policy.
    """

    min_crop: float = 0.5
    auto_augment: str = "none"
    color_jitter: float = 0.0
    views: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1 or not 0 <= self.color_jitter <= 1 or self.views < 1:
            raise UserError(
                "Training images cannot be changed so: min_crop not in (0, 1], color_jitter not in [0, 1], or "
                "repeated_augmentation below 1."
            )
        if self.color_jitter and self.auto_augment not in ("none", "3a"):
            raise UserError(
                f"color_jitter has no effect beside auto_augment {self.auto_augment}.",
                why="That policy changes colours itself.",
                fix='Set color_jitter = 0, or auto_augment = "3a" or "none".',
            )
        if self.auto_augment != "none":
            _require_policy(self.auto_augment)


def _require_policy(words: str) -> None:
    """Refuse what timm does not read as a policy, or reads by leaving parts of it out."""
    kind, *parts = words.split("-")
    grammar = _POLICY_PARTS.get(kind)
    if grammar is None or not all(re.fullmatch(grammar, part) for part in parts):
        raise UserError(
            f"auto_augment {words!r} is no policy of timm.",
            why="It is rand, augmix, 3a, original, originalr, v0 or v0r, and parts like m9 or mstd0.5 after hyphens.",
            fix="Use rand-m9-mstd0.5-inc1 (RandAugment), 3a (3-Augment), or none.",
        )


def _keep_a_bit(steps: Iterable[Any]) -> None:
    """Let posterizing keep a bit of every colour: timm may ask for none, which Pillow refuses since version 13."""
    for step in steps:
        operations = [*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one, operation.level_fn)


def _at_least_one(bits_of: Callable[..., tuple[int]], *level: Any) -> tuple[int]:
    return (max(1, bits_of(*level)[0]),)


_NUMBER = r"[0-9]{1,3}(\.[0-9]+)?"
_POLICY_PARTS = {
    "rand": rf"(m|mmax)[0-9]{{1,2}}|n[1-9]|p(0\.[0-9]+|1)|mstd{_NUMBER}|inc[01]",
    "augmix": rf"m[0-9]{{1,2}}|[wd][1-9]|a(?![0.]+$){_NUMBER}|mstd{_NUMBER}|b[01]",
    **dict.fromkeys(("3a", "original", "originalr", "v0", "v0r"), rf"mstd{_NUMBER}"),
}
"""By kind of policy, the parts that may follow it (timm.data.auto_augment). Magnitudes and numbers of layers are whole,
and small: timm fails at others when it reads the first picture, and a hundred layers take seconds a picture."""


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

    def train_transform(self, augmentation: Augmentation) -> Transform:
        """timm's random crop, flip and colours: PIL image to uint8 [3, H, W], to be normalised in batches."""
        policy = augmentation.auto_augment
        transform = create_transform(
            self.input_size,
            is_training=True,
            scale=(augmentation.min_crop, 1.0),
            color_jitter=augmentation.color_jitter,
            auto_augment=None if policy == "none" else policy,
            interpolation=self.interpolation,
            mean=self.mean,  # fills what a policy moves into the picture
            use_prefetcher=True,  # timm's word for it
        )
        _keep_a_bit(transform.transforms)
        return cast(Transform, transform)

    def normalised(self, images: Tensor) -> Tensor:
        """Pixels, uint8 [B, 3, H, W], as the float32 that the model takes."""
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) * 255 for v in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)


def raw_pixels(images: Tensor, preprocess: Preprocess) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Normalised images [B, 3, H, W] as the pixels that they were, uint8 [B, H, W, 3]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return np.asarray(pixels.contiguous().numpy())


class _Prepared(Dataset[tuple[Tensor, int]]):
    """Transformed pictures by position."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self._images, self._transform = images, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        return self._transform(image), label

    def __getitems__(self, indices: list[int]) -> Samples | UserError:
        """A batch. What a user can mend is returned: raised in a worker, it would come with a traceback as its text."""
        try:
            return [self[index] for index in indices]
        except UserError as error:
            return error


class _Changed(_Prepared):
    """Pictures by position and seed: what is drawn at random for one depends on its seed alone."""

    def __getitems__(self, drawn: list[tuple[int, int]]) -> Samples | UserError:  # type: ignore[override]
        try:
            with _own_generators():
                return [self._seeded(index, seed) for index, seed in drawn]
        except UserError as error:
            return error

    def _seeded(self, index: int, seed: int) -> tuple[Tensor, int]:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        return self[index]


@contextmanager
def _own_generators() -> Iterator[None]:
    """The global generators of Python, numpy and torch, from which timm's transforms draw, are put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _collated(samples: Samples | UserError) -> Any:
    return samples if isinstance(samples, UserError) else default_collate(samples)


def _without_errors(loader: Iterable[tuple[Tensor, Tensor] | UserError]) -> Batches:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def batches(
    dataset: Images,
    preprocess: Preprocess,
    batch_size: int,
    *,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    pin_memory: bool = False,
) -> Batches:
    """All pictures in order, for evaluation: batches (images [B, 3, H, W] float32, labels [B] int64).

    Args:
        dataset: the pictures.
        preprocess: how they are prepared.
        batch_size: pictures of a batch.
        workers: processes that read.
        share: (rank, processes) of the process that asks: it gets every so-many-th batch.
        pin_memory: whether batches lie where a GPU fetches them from.
    """
    rank, processes = share
    starts = range(rank * batch_size, len(dataset), processes * batch_size)
    loader = DataLoader(
        _Prepared(dataset, preprocess.eval_transform()),
        batch_size=batch_size,
        sampler=[index for start in starts for index in range(start, min(start + batch_size, len(dataset)))],
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise the loader takes a number from the global generator
    )
    return _without_errors(loader)


class _Order(Sampler[tuple[int, int]]):
    """The pictures of one process in the whole batches of an epoch: position, and seed of what is drawn for it."""

    def __init__(self, images: Images, batch_size: int, seed: int, share: tuple[int, int], views: int) -> None:
        self._count, self._runs, self._views = len(images), images.runs, views
        self._batch_size, self._seed, self._share = batch_size, seed, share
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return (self._count // self._batch_size - self.skip) * (self._batch_size // self._share[1])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, processes = self._share
        part = self._batch_size // processes
        own = stream(self._seed, self.epoch)
        order = epoch_order(self._count, self._runs, torch.Generator().manual_seed(own))
        order = order.repeat_interleave(self._views)[: self._count]
        for step in range(self.skip, self._count // self._batch_size):
            start = step * self._batch_size + rank * part
            for place, index in enumerate(order[start : start + part].tolist(), start):
                yield index, stream(own, place)


def epoch_order(count: int, runs: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random order, int64 [count].

    Pictures of large shards come shard by shard, mixed by a shuffle buffer: each moves by less than `SHUFFLE_BUFFER`
    places, so that files are read from front to back, and one order fits any number of workers and processes.

    Args:
        runs: how many pictures each shard has, as in `Images`.
    """
    if not runs or count <= SHUFFLE_BUFFER:
        return torch.randperm(count, generator=generator)
    parts = torch.split(torch.arange(count), list(runs))
    stream_of_shards = torch.cat([parts[at] for at in torch.randperm(len(runs), generator=generator).tolist()])
    moved = torch.arange(count) + SHUFFLE_BUFFER * torch.rand(count, generator=generator, dtype=torch.float64)
    return stream_of_shards[moved.argsort(stable=True)]


_CROPS = Augmentation()


class TrainingBatches:
    """Random crops and flips of the pictures in a random order: whole batches, epoch after epoch.

    Order and changes depend on seed, epoch and place in the epoch alone, whatever the number of workers and of
    processes: a training that goes on sees what the uninterrupted one would have seen. Workers stay from epoch to
    epoch.

    Args:
        dataset: the pictures.
        preprocess: how they are prepared.
        batch_size: pictures of a batch, over all processes.
        augmentation: what is changed at random.
        seed: decides order and changes, with the number of the epoch.
        workers: processes that read.
        share: (rank, processes) of the process that asks. Of every batch it gets its part, B / processes pictures.
        device: where the batches are wanted. They go there as bytes and are normalised there, a quarter of the way for
            workers and GPUs.

    Raises:
        UserError: there are fewer pictures than one batch has.

    Example:
        >>> from upvits.calib_data.demo import demo_images
        >>> preprocess = Preprocess((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
        >>> training = TrainingBatches(demo_images("train", 40), preprocess, 16)
        >>> [tuple(images.shape) for images, labels in training.epoch(0)]
        [(16, 3, 64, 64), (16, 3, 64, 64)]
    """

    def __init__(
        self,
        dataset: Images,
        preprocess: Preprocess,
        batch_size: int,
        *,
        augmentation: Augmentation = _CROPS,
        seed: int = 0,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
        device: torch.device = torch.device("cpu"),  # noqa: B008  # a value
    ) -> None:
        require_whole_batch(batch_size, len(dataset))
        self._preprocess, self._device = preprocess, device
        self._order = _Order(dataset, batch_size, seed, share, augmentation.views)
        self._loader = DataLoader(
            _Changed(dataset, preprocess.train_transform(augmentation)),
            batch_size=batch_size // share[1],
            sampler=self._order,
            num_workers=workers,
            collate_fn=_collated,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # see `batches`
        )

    def epoch(self, number: int, skip: int = 0) -> Batches:
        """Batches (images [B / processes, 3, H, W] float32, labels [B / processes] int64) of one epoch; the first
        `skip` were seen already. One epoch at a time."""
        self._order.epoch, self._order.skip = number, skip
        for images, labels in _without_errors(self._loader):
            images, labels = (part.to(self._device, non_blocking=True) for part in (images, labels))
            yield (self._preprocess.normalised(images) if images.dtype == torch.uint8 else images), labels


def require_whole_batch(batch_size: int, images: int) -> None:
    """Refuse a batch that is larger than the data.

    Raises:
        UserError: there are fewer images than that.
    """
    if batch_size > images:
        raise UserError(
            f"A batch of {batch_size} is larger than the data, which have {images} training images.",
            why="The learning rate is meant for a batch of that size, and no step would have one.",
            fix=f"Give `batch_size={images}` or less, or leave it out.",
        )


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
