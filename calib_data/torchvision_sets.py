"""Data sets of torchvision, by timm's names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.data.dataset_factory import create_dataset

from upvits.calib_data.datasets import DataSource, Images
from upvits.calib_data.decoding import to_rgb
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.hugging_face import first_line, published_digest
from upvits.calib_data.printable import printable

TORCH_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "image_folder")


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
        digest=published_digest(name, train, val),
    )


def _open_torch_split(name: str, root: Path, split: str) -> Any:
    is_new = not root.exists()
    try:
        try:
            return create_dataset(f"torch/{name}", root=str(root), split=split)
        except RuntimeError:  # torchvision's "not found or corrupted"
            root.mkdir(parents=True, exist_ok=True)
            return create_dataset(f"torch/{name}", root=str(root), split=split, download=True)
    except Exception as error:  # of any kind: torchvision takes files as they are
        if is_new:
            with suppress(OSError):
                root.rmdir()  # only where nothing came
        raise MissingDependencyError(
            f"The data set torch/{name} is not whole in {root} and could not be downloaded there.",
            why=printable(first_line(error), 300),
            fix=f"Let torchvision download it on a machine with network, copy the folder, and give torch:{name}:DIR.",
        ) from None


def _of_torch(dataset: Any) -> Images:
    return Images([int(label) for label in dataset.targets], lambda index: to_rgb(dataset[index][0]))
