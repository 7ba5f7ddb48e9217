"""timm's sources with random access: `hfds/` (Hugging Face datasets) and `torch/` (torchvision datasets)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset

from upvits.calib_data.datasets import DataSource, Images
from upvits.calib_data.decoding import open_image, to_rgb
from upvits.calib_data.errors import MissingDependencyError, UserError

TORCH_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "image_folder")
_VAL_SPLITS = ("validation", "val", "valid", "test")


def open_torch(spec: str, name: str, root: Path | None) -> DataSource:
    """A torchvision data set by timm's name, downloaded into `root` (default: torch's cache) when not there yet."""
    if name not in TORCH_NAMES:
        raise UserError(f"Unknown torchvision data set {name!r}.", fix="Known: " + ", ".join(TORCH_NAMES) + ".")
    if name == "image_folder":
        raise UserError(
            f"{spec} reads a plain image folder.", fix=f"Use imagefolder:{root or 'DIR'}, which also checks the images."
        )
    folder = root or Path(torch.hub.get_dir()) / "datasets"
    splits = [_open_torch_split(name, folder, split) for split in ("train", "validation")]
    train, val = (_of_torch(split) for split in splits)
    return DataSource(
        spec=spec,
        class_names=tuple(str(name) for name in splits[0].classes),
        train=train,
        val=val,
        digest=_digest(name, train, val),
    )


def _open_torch_split(name: str, root: Path, split: str) -> Any:
    try:
        try:
            return create_dataset(f"torch/{name}", root=str(root), split=split)
        except RuntimeError:  # torchvision's "not found or corrupted"
            root.mkdir(parents=True, exist_ok=True)
            return create_dataset(f"torch/{name}", root=str(root), split=split, download=True)
    except (RuntimeError, OSError) as error:
        raise MissingDependencyError(
            f"The data set torch/{name} is not in {root} and could not be downloaded there.",
            why=_first_line(error),
            fix=f"Let torchvision download it on a machine with network, copy the folder, and give torch:{name}:DIR.",
        ) from None


def _of_torch(dataset: Any) -> Images:
    return Images([int(label) for label in dataset.targets], lambda index: to_rgb(dataset[index][0]))


def open_hfds(spec: str, name: str) -> DataSource:
    """A Hugging Face data set with the columns `image` and `label`; its name on the hub or a local folder."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            f"{spec} needs the package datasets.", fix="pip install datasets, or use imagefolder:DIR."
        ) from None
    train_split = _open_hfds_split(name, ("train",))
    val_split = _open_hfds_split(name, _VAL_SPLITS)
    train, val = _of_hfds(train_split, spec), _of_hfds(val_split, spec)
    class_to_index = train_split.reader.class_to_idx
    num_classes = max(*train.labels, *val.labels) + 1
    names = sorted(class_to_index, key=class_to_index.__getitem__) or [str(label) for label in range(num_classes)]
    return DataSource(
        spec=spec,
        class_names=tuple(names),
        train=train,
        val=val,
        digest=_digest(name, train, val),
    )


def _open_hfds_split(name: str, splits: Sequence[str]) -> Any:
    """The first of `splits` that the data set has."""
    reasons = []
    for split in splits:
        try:
            return create_dataset(f"hfds/{name}", split=split)
        except ValueError as error:  # no such split, or no such column
            reasons.append(_first_line(error))
        except (OSError, RuntimeError) as error:
            raise MissingDependencyError(
                f"Cannot load the Hugging Face data set {name}.",
                why=_first_line(error),
                fix="Check its name and the network, or save it on a machine with network and give imagefolder:DIR.",
            ) from None
    raise UserError(
        f"The Hugging Face data set {name} has no usable split {' or '.join(splits)}.",
        why=reasons[-1],
        fix="It needs training and validation splits with the columns image and label.",
    )


def _of_hfds(dataset: Any, spec: str) -> Images:
    reader = dataset.reader
    if reader.label_key not in reader.dataset.column_names:
        raise UserError(
            f"{spec} has no column {reader.label_key!r}.",
            why="It has " + ", ".join(reader.dataset.column_names) + ".",
            fix="Rename its columns to image and label.",
        )

    def read(index: int) -> Image.Image:
        stream, _ = reader[index]
        with stream, open_image(stream) as image:
            return to_rgb(image)

    try:
        labels = [int(label) for label in reader.dataset[reader.label_key]]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{spec} has a label that is no number ({error}).", fix="Give a data set with one class per image."
        ) from None
    return Images(labels, read)


def _digest(name: str, train: Images, val: Images) -> str:
    """sha256 over name, labels and the pixels of a few pictures: these sets are published, and rarely change."""
    digest = hashlib.sha256(name.encode())
    for images in (train, val):
        digest.update(bytes(str(images.labels), "ascii"))
        for index in range(0, len(images), max(1, len(images) // 64)):
            digest.update(images[index][0].tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
