"""Local WebDataset shards by position: tar files in which x.jpg and x.cls are one sample.

The same files and the same `_info.json` as timm's `wds/` source. That one only streams; scoring draws random pictures
and a continued training run must see the same order again, so samples are read by their place in the tar file.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, RootModel

from upvits.calib_data.classes import natural_order
from upvits.calib_data.columns import is_number, label_text, only_label
from upvits.calib_data.datasets import MAX_CLASSES, UNLABELLED, DataSource, Images
from upvits.calib_data.decoding import DECODING_ERRORS, EXTENSIONS, LARGEST_PICTURE, depth_in, load_rgb
from upvits.calib_data.depth import Depth, deepest, depth_notes
from upvits.calib_data.documents import parse_document, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.folders import TRAIN_NAMES, VAL_NAMES
from upvits.calib_data.labelled import FULL_CHECK_LIMIT, refuse_lost_classes, refuse_many_unreadable, split_by_hash
from upvits.calib_data.paths import RelativePath
from upvits.calib_data.progress import watched

_INFO_NAMES = ("_info.json", "info.json")
_LABEL_BYTES = 256
_JSON_BYTES = 1 << 20


class _Split(BaseModel):
    """`filenames` of the shards, relative to their folder."""

    filenames: tuple[RelativePath, ...]


class _Info(BaseModel):
    """What is read of the info file."""

    splits: dict[str, _Split] = {}
    class_names: tuple[str, ...] | None = None


class _Json(RootModel[dict[str, Any]]):
    """What lies beside a picture."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """A picture inside a shard, and its label as it stands there: a number or a name."""

    shard: Path
    member: str
    offset: int
    size: int
    label: str | None

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.shard}:{self.member}"


def open_shards(
    spec: str, root: Path, *, image_key: str | None = None, label_column: str | None = None, quiet: bool = True
) -> DataSource:
    """Opens a folder of local shards.

    Args:
        image_key: which picture of a sample, by what follows the first dot of its name: "jpg", "mask.png".
        label_column: entry of the `.json` files that is the label; "none": there are no labels.

    Raises:
        UserError: it is missing, empty, inconsistent or damaged.
    """
    if not root.is_dir():
        raise UserError(
            f"No folder of shards at {root}.",
            why="Shards are read from local tar files, since scoring needs random access.",
            fix="Download the shards first, then give wds:DIR.",
        )
    info = _read_info(root)
    train_shards, val_shards = (_shards_of(root, info, names) for names in (TRAIN_NAMES, VAL_NAMES))
    if not train_shards and not val_shards:
        train_shards = sorted(root.rglob("*.tar"))
    if not train_shards:
        raise UserError(
            f"No training shards in {root}.",
            fix="Name the shards *train*.tar and *val*.tar, or list them as splits train and validation in _info.json.",
        )
    train, val = (
        [sample for shard in shards for sample in _index(shard, image_key, label_column)]
        for shards in (train_shards, val_shards)
    )
    for split, shards, samples in (("training", train_shards, train), ("validation", val_shards, val)):
        if shards and not samples:
            raise UserError(f"No images in the {split} shards of {root}.", fix="A sample is an image and a .cls file.")
    notes: tuple[str, ...] = ()
    tests = all("test" in shard.relative_to(root).as_posix().lower() for shard in val_shards)
    if val and tests and all(s.label is None for s in val) and any(s.label is not None for s in train):
        notes = (f"{len(val)} images in {val_shards[0].name} have no labels and were left out.",)
        val, val_shards = [], []
    unreadable, depth, checked = _check([*train, *val], quiet=quiet)
    skipped = tuple(str(sample) for sample in unreadable)
    refuse_many_unreadable(skipped, len(train) + len(val), root)
    bad = set(unreadable)
    for samples in (train, val):
        refuse_lost_classes([s.label for s in samples], [s.label for s in samples if s not in bad], skipped)
    train, val = ([sample for sample in split if sample not in bad] for split in (train, val))
    if not val:
        train, val = split_by_hash(train, [s.label for s in train], [os.path.relpath(str(s), root) for s in train])
    names, by_name = _class_names(info, [*train, *val], root)
    return DataSource(
        spec=spec,
        class_names=names,
        train=_images(train, names, depth, by_name=by_name),
        val=_images(val, names, depth, by_name=by_name),
        digest=_digest(root, train_shards, val_shards, image_key, label_column, depth),
        skipped=skipped,
        numbered_by_name=by_name and info.class_names is None,
        notes=(*notes, *depth_notes(depth, checked)),
    )


def _images(samples: list[_Sample], names: tuple[str, ...] | None, depth: Depth, *, by_name: bool) -> Images:
    def read(index: int) -> Image.Image:
        try:
            return load_rgb(samples[index].read(), depth)
        except DECODING_ERRORS as error:
            raise UserError(f"Cannot read the image {samples[index]}: {error}.", fix="Repair the shard.") from None

    number = {name: label for label, name in enumerate(names or ())}
    labels = (sample.label for sample in samples)
    return Images([UNLABELLED if x is None else number[x] if by_name else int(x) for x in labels], read)


def _read_info(root: Path) -> _Info:
    path = next((root / name for name in _INFO_NAMES if (root / name).exists()), None)
    return _Info() if path is None else read_document(path, _Info, fix="Repair or remove the file.")


def _shards_of(root: Path, info: _Info, names: tuple[str, ...]) -> list[Path]:
    """Shards of a split: those listed in the info file, or else those whose path below `root` tells."""
    listed = next((info.splits[name].filenames for name in names if name in info.splits), None)
    if listed is not None:
        return [root / name for name in listed]
    below = {path: path.relative_to(root).as_posix().lower() for path in sorted(root.rglob("*.tar"))}
    of_name = ([path for path, relative in below.items() if name in relative] for name in names)
    return next((shards for shards in of_name if shards), [])


@dataclass(slots=True)
class _Files:
    """The files of one sample in a shard: pictures by what follows the first dot of their names, and its label."""

    pictures: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    label: str | None = None
    document: bytes | None = None


def _index(shard: Path, image_key: str | None, label_column: str | None) -> list[_Sample]:
    """The samples of a shard in their order, without reading pictures."""
    found: dict[str, _Files] = {}
    require_regular(shard, fix="Give tar files, or remove this one.")
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                files = found.setdefault(f"{folder}/{stem}", _Files())
                if Path(name).suffix.lower() in EXTENSIONS:
                    files.pictures[extension] = _picture(member)
                elif extension == "cls" and label_column is None:
                    files.label = _text_label(_content(tar, member, _LABEL_BYTES))
                elif extension == "json" and label_column != "none":
                    files.document = _content(tar, member, _JSON_BYTES)
        for key, files in found.items():
            if files.document is not None and files.label is None:
                files.label = _json_label(files.document, f"{shard}:{key.removeprefix('/')}.json", label_column)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(
            f"Cannot read the shard {shard}: {error}.",
            fix="Give whole, uncompressed tar files whose .cls files hold a number or the name of a class.",
        ) from None
    samples = []
    for key, files in found.items():
        if files.pictures:
            picture = _chosen(files.pictures, image_key, f"{shard}:{key.removeprefix('/')}")
            samples.append(_Sample(shard, picture.name, picture.offset_data, picture.size, files.label))
    return samples


def _chosen(pictures: dict[str, tarfile.TarInfo], image_key: str | None, sample: str) -> tarfile.TarInfo:
    """The picture of a sample. Names with one suffix go before others, as in timm: x.jpg before x.mask.png."""
    names = ", ".join(sorted(pictures))
    if image_key is not None:
        if image_key not in pictures:
            raise UserError(
                f"The sample {sample} has no picture {image_key}.", why=f"It has {names}.", fix="Correct `image_key=`."
            )
        return pictures[image_key]
    plain = [picture for extension, picture in pictures.items() if "." not in extension]
    fitting = plain or list(pictures.values())
    if len(fitting) > 1:
        raise UserError(
            f"The sample {sample} has several pictures: {names}.",
            why="One of them is the image, and the others may be masks or depth.",
            fix=f'Say which: `image_key="{sorted(pictures)[0]}"`.',
        )
    return fitting[0]


def _picture(member: tarfile.TarInfo) -> tarfile.TarInfo:
    if member.size < 0:  # as an extended header can say
        raise ValueError(f"the image {member.name} has {member.size} bytes")
    if member.size > LARGEST_PICTURE:
        raise ValueError(f"the image {member.name} has {member.size >> 20:,} MiB")
    return member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, largest: int) -> bytes:
    content = tar.extractfile(member)
    if not 0 <= member.size <= largest or content is None:
        raise ValueError(f"{'a .cls file' if largest == _LABEL_BYTES else 'a .json file'} has {member.size} bytes")
    return content.read(largest)


def _text_label(content: bytes) -> str:
    """The label in a .cls file: a number from 0 on, or a name. Raises ValueError for anything else."""
    text = content.decode(errors="replace").strip()
    if not text or not text.isprintable() or "\ufffd" in text or (is_number(text) and not text.isdecimal()):
        raise ValueError(f"a .cls file holds {content[:20]!r} instead of a number from 0 on or a name")
    return _bounded(text)


def _bounded(text: str) -> str:
    """The label, a number without zeros before it. Raises ValueError for a number that is too large."""
    if not is_number(text):
        return text
    if len(text) > 9 or int(text) >= MAX_CLASSES:
        raise ValueError(f"a .cls file or .json label holds {text[:20]!r} instead of a number to {MAX_CLASSES - 1}")
    return str(int(text))


def _json_label(content: bytes, name: str, label_column: str | None) -> str:
    """The label in a .json file: of one entry that is called like a label. Raises ValueError for a wrong value."""
    entries = parse_document(content, name, _Json, fix="Correct the file.").root
    key = only_label(entries, name, label_column)
    return _bounded(label_text(entries[key], f"{name}: {key}"))


def _check(samples: list[_Sample], *, quiet: bool) -> tuple[list[_Sample], Depth, int]:
    """The unreadable ones, the range of those with more than 8 bits, and how many were looked at."""
    sample = samples[:: max(1, -(-len(samples) // FULL_CHECK_LIMIT))]
    depths = [depth_in(one.read()) for one in watched(sample, "checking images", quiet=quiet)]
    unreadable = [one for one, depth in zip(sample, depths, strict=True) if depth is None]
    return unreadable, deepest(depth for depth in depths if depth is not None), len(sample)


def _class_names(info: _Info, samples: list[_Sample], root: Path) -> tuple[tuple[str, ...] | None, bool]:
    """Names from the info file where it has them, else those of the labels; and whether labels are names."""
    labels = {sample.label for sample in samples}
    if labels == {None}:
        return None, False
    if None in labels:
        example = next(sample for sample in samples if sample.label is None)
        raise UserError(
            f"Some samples in {root} have no .cls file and no label in a .json, for example {example}.",
            fix="Label all or none.",
        )
    found = [label for label in labels if label is not None]
    names, by_name = info.class_names, not all(is_number(label) for label in found)
    if by_name:
        names = natural_order(found) if names is None else names
        strange = sorted(set(found) - set(names))
        if strange or len(names) < 2:
            raise UserError(
                f"The labels in {root} and the class names do not fit, for example {(strange or found)[0]!r}.",
                fix="Use names of at least two classes, and correct class_names in _info.json.",
            )
        return names, True
    last = max(map(int, found))
    if names is None:
        names = tuple(str(label) for label in range(last + 1))
    if len(names) < 2 or last >= len(names):
        raise UserError(
            f"The labels in {root} go up to {last}, and there are {len(names)} class names.",
            fix="Use labels 0 to n-1 of at least two classes, and correct class_names in _info.json.",
        )
    return names, False


def _digest(
    root: Path, train: list[Path], val: list[Path], image_key: str | None, label_column: str | None, depth: Depth
) -> str:
    """sha256 over split, relative path and content of each shard, and how samples are read where that is not usual."""
    asked = repr((image_key, label_column)) if image_key or label_column else ""
    digest = hashlib.sha256((asked + ("" if depth == Depth() else repr(depth))).encode())
    for split, shards in (("train", train), ("val", val)):
        for shard in shards:
            digest.update(f"{split}\0{os.path.relpath(shard, root)}\0{shard.stat().st_size}\n".encode())
            with shard.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
