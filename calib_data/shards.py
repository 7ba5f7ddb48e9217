"""Local WebDataset shards by position: tar files in which x.jpg and x.cls are one sample.

The same files and the same `_info.json` as timm's `wds/` source. That one only streams; scoring draws random pictures
and a continued training run must see the same order again, so samples are read by their place in the tar file.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import BaseModel

from upvits.calib_data.datasets import MAX_CLASSES, UNLABELLED, DataSource, Images
from upvits.calib_data.decoding import DECODING_ERRORS, EXTENSIONS, LARGEST_PICTURE, is_readable, load_rgb
from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.folders import FULL_CHECK_LIMIT, TRAIN_NAMES, VAL_NAMES, refuse_many_unreadable
from upvits.calib_data.paths import RelativePath
from upvits.calib_data.progress import watched

_INFO_NAMES = ("_info.json", "info.json")
_LABEL_BYTES = 64


class _Split(BaseModel):
    """`filenames` of the shards, relative to their folder."""

    filenames: tuple[RelativePath, ...]


class _Info(BaseModel):
    """What is read of the info file."""

    splits: dict[str, _Split] = {}
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Sample:
    """A picture inside a shard."""

    shard: Path
    member: str
    offset: int
    size: int
    label: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.shard}:{self.member}"


def open_shards(spec: str, root: Path, *, quiet: bool = True) -> DataSource:
    """Opens a folder of local shards. Raises UserError when it is missing, empty, inconsistent or damaged."""
    if not root.is_dir():
        raise UserError(
            f"No folder of shards at {root}.",
            why="Shards are read from local tar files, since scoring needs random access.",
            fix="Download the shards first, then give wds:DIR.",
        )
    info = _read_info(root)
    train_shards, val_shards = (_shards_of(root, info, names) for names in (TRAIN_NAMES, VAL_NAMES))
    if not train_shards or not val_shards:
        raise UserError(
            f"No {'validation' if train_shards else 'training'} shards in {root}.",
            fix="Name the shards *train*.tar and *val*.tar, or list them as splits train and validation in _info.json.",
        )
    train, val = ([sample for shard in shards for sample in _index(shard)] for shards in (train_shards, val_shards))
    for split, samples in (("training", train), ("validation", val)):
        if not samples:
            raise UserError(f"No images in the {split} shards of {root}.", fix="A sample is an image and a .cls file.")
    unreadable = _unreadable([*train, *val], quiet=quiet)
    skipped = tuple(str(sample) for sample in unreadable)
    refuse_many_unreadable(skipped, len(train) + len(val), root)
    bad = set(unreadable)
    train, val = ([sample for sample in split if sample not in bad] for split in (train, val))
    return DataSource(
        spec=spec,
        class_names=_class_names(info, [*train, *val], root),
        train=_images(train),
        val=_images(val),
        digest=_digest(root, train_shards, val_shards),
        skipped=skipped,
    )


def _images(samples: list[_Sample]) -> Images:
    def read(index: int) -> Image.Image:
        try:
            return load_rgb(samples[index].read())
        except DECODING_ERRORS as error:
            raise UserError(f"Cannot read the image {samples[index]}: {error}.", fix="Repair the shard.") from None

    return Images([sample.label for sample in samples], read)


def _read_info(root: Path) -> _Info:
    path = next((root / name for name in _INFO_NAMES if (root / name).exists()), None)
    return _Info() if path is None else read_document(path, _Info, fix="Repair or remove the file.")


def _shards_of(root: Path, info: _Info, names: tuple[str, ...]) -> list[Path]:
    """Shards of a split: those listed in the info file, or else those whose path below `root` tells."""
    listed = next((info.splits[name].filenames for name in names if name in info.splits), None)
    if listed is not None:
        return [root / name for name in listed]
    below = {path: path.relative_to(root).as_posix().lower() for path in sorted(root.rglob("*.tar"))}
    return [path for path, relative in below.items() if any(name in relative for name in names)]


def _index(shard: Path) -> list[_Sample]:
    """The samples of a shard in their order, without reading pictures."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    require_regular(shard, fix="Give tar files, or remove this one.")
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile():
                    continue
                if f".{extension.lower()}" in EXTENSIONS:
                    images[key] = _picture(member)
                elif extension == "cls" and (content := tar.extractfile(member)) is not None:
                    labels[key] = _label(content.read(_LABEL_BYTES + 1))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(
            f"Cannot read the shard {shard}: {error}.",
            fix="Give whole, uncompressed tar files whose .cls files hold a number.",
        ) from None
    return [
        _Sample(shard, member.name, member.offset_data, member.size, labels.get(key, UNLABELLED))
        for key, member in images.items()
    ]


def _picture(member: tarfile.TarInfo) -> tarfile.TarInfo:
    if member.size > LARGEST_PICTURE:
        raise ValueError(f"the image {member.name} has {member.size >> 20:,} MiB")
    return member


def _label(content: bytes) -> int:
    """The label in a .cls file. Raises ValueError for anything but a short number from 0 on."""
    text = content.strip()
    if len(content) > _LABEL_BYTES or re.fullmatch(rb"[0-9]{1,9}", text) is None or int(text) >= MAX_CLASSES:
        raise ValueError(f"a .cls file holds {text[:20]!r} instead of a number from 0 to {MAX_CLASSES - 1}")
    return int(text)


def _unreadable(samples: list[_Sample], *, quiet: bool) -> list[_Sample]:
    step = max(1, -(-len(samples) // FULL_CHECK_LIMIT))
    return [
        sample for sample in watched(samples[::step], "checking images", quiet=quiet) if not is_readable(sample.read())
    ]


def _class_names(info: _Info, samples: list[_Sample], root: Path) -> tuple[str, ...] | None:
    """Names from the info file where it has them, else the numbers."""
    labels = {sample.label for sample in samples}
    if labels == {UNLABELLED}:
        return None
    if UNLABELLED in labels:
        example = next(sample for sample in samples if sample.label == UNLABELLED)
        raise UserError(f"Some samples in {root} have no .cls file, for example {example}.", fix="Label all or none.")
    names = info.class_names
    if names is None:
        names = tuple(str(label) for label in range(max(labels) + 1))
    if len(names) < 2 or max(labels) >= len(names):
        raise UserError(
            f"The labels in {root} go up to {max(labels)}, and there are {len(names)} class names.",
            fix="Use labels 0 to n-1 of at least two classes, and correct class_names in _info.json.",
        )
    return names


def _digest(root: Path, train: list[Path], val: list[Path]) -> str:
    """sha256 over split, relative path and content of each shard."""
    digest = hashlib.sha256()
    for split, shards in (("train", train), ("val", val)):
        for shard in shards:
            digest.update(f"{split}\0{os.path.relpath(shard, root)}\0{shard.stat().st_size}\n".encode())
            with shard.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
