"""WebDataset shards by position: tar files in which x.jpg and x.cls are one sample, here or at a URL of fsspec.

The same files and the same `_info.json` as timm's `wds/` source. Neither timm nor the WebDataset library reads them
here: both only stream, so that the order depends on the number of workers and processes, and an interrupted epoch can't
go on with the images that were left; scoring draws random pictures. So every sample is known by its place in a tar
file, which is found once and remembered, and training asks for samples in the order of a stream (`loading.py`).
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, StringConstraints

from upvits.calib_data.classes import natural_order
from upvits.calib_data.columns import is_number
from upvits.calib_data.datasets import SHUFFLE_BUFFER, UNLABELLED, DataSource, Images
from upvits.calib_data.decoding import DECODING_ERRORS, depth_in, load_rgb
from upvits.calib_data.depth import Depth, deepest, depth_notes
from upvits.calib_data.documents import parse_document, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.folders import TRAIN_NAMES, VAL_NAMES
from upvits.calib_data.labelled import FULL_CHECK_LIMIT, refuse_lost_classes, refuse_many_unreadable, split_by_hash
from upvits.calib_data.packed import PackedTexts
from upvits.calib_data.paths import RelativePath
from upvits.calib_data.progress import watched
from upvits.calib_data.remembered import KeptDocument, is_settled, keep_document, mark_of, recalled
from upvits.calib_data.shard_files import Shard, ShardReader, is_url, listed_in, read_text_at
from upvits.calib_data.shard_index import Sample, ShortShardError, samples_in

_INFO_NAMES = ("_info.json", "info.json")

REMOTE_CHECK_LIMIT = 512
"""So many pictures of remote shards are decoded when they are opened: each is a request."""


class _Split(BaseModel):
    """`filenames` of the shards, relative to their folder."""

    filenames: tuple[RelativePath, ...]


class _Info(BaseModel):
    """What is read of the info file."""

    splits: dict[str, _Split] = {}
    class_names: tuple[str, ...] | None = None


class _Index(KeptDocument):
    """The samples of one shard: names, labels, and places as "offset size"."""

    mark: str
    members: tuple[str, ...]
    labels: tuple[str | None, ...]
    places: tuple[Annotated[str, StringConstraints(pattern=r"^\d{1,15} \d{1,12}$")], ...]


class _Facts(KeptDocument):
    """What was found out about all pictures of a data set: numbers of the unreadable ones, range, how many were looked
    at, and the digest."""

    unreadable: tuple[int, ...]
    whole: int
    real: int
    checked: int
    digest: str


def open_shards(
    spec: str,
    root: Path | str,
    *,
    image_key: str | None = None,
    label_column: str | None = None,
    recheck: bool = False,
    quiet: bool = True,
) -> DataSource:
    """Opens shards.

    Args:
        root: a folder of tar files, a tar file, or a pattern of them with braces; a path, or a URL that fsspec reads.
        image_key: which picture of a sample, by what follows the first dot of its name: "jpg", "mask.png".
        label_column: entry of the `.json` files that is the label; "none": there are no labels.
        recheck: nothing that is remembered is believed.

    Raises:
        UserError: it is missing, empty, inconsistent or damaged, or a shard ends early.
        MissingDependencyError: a package for the URL is missing.
    """
    root = str(root)
    info, train_shards, val_shards = _shards(root)
    opened_ns = time.time_ns()
    asked = (image_key, label_column)
    marks = {shard: shard.mark() for shard in (*train_shards, *val_shards)}
    samples = _indexed(marks, asked, opened_ns, recheck=recheck, quiet=quiet)
    train, val = ([one for shard in shards for one in samples[shard]] for shards in (train_shards, val_shards))
    for split, shards, found in (("training", train_shards, train), ("validation", val_shards, val)):
        if shards and not found:
            raise UserError(f"No images in the {split} shards of {root}.", fix="A sample is an image and a .cls file.")
    notes: tuple[str, ...] = ()
    tests = all("test" in shard.name.lower() for shard in val_shards)
    if val and tests and all(s.label is None for s in val) and any(s.label is not None for s in train):
        name = val_shards[0].name.rpartition("/")[2]
        notes = (f"{len(val)} images in {name} have no labels and were left out.",)
        val, val_shards = [], []
    both = [*train, *val]
    reader = _reader(marks, len(both))
    facts = _facts(both, reader, (train_shards, val_shards), marks, asked, opened_ns, recheck=recheck, quiet=quiet)
    bad = {both[number] for number in facts.unreadable}
    depth, skipped = Depth(facts.whole, facts.real), tuple(str(both[number]) for number in facts.unreadable)
    refuse_many_unreadable(skipped, len(both), Path(root))
    for part in (train, val):
        refuse_lost_classes([s.label for s in part], [s.label for s in part if s not in bad], skipped)
    train, val = ([sample for sample in split if sample not in bad] for split in (train, val))
    if not val:
        names_inside = [os.path.normpath(f"{s.shard.name}:{s.member}") for s in train]
        train, val = split_by_hash(train, [s.label for s in train], names_inside)
    names, by_name = _class_names(info, [*train, *val], root)
    number = {shard: position for position, shard in enumerate(marks)}
    return DataSource(
        spec=spec,
        class_names=names,
        train=_images(train, reader, number, names, depth, by_name=by_name),
        val=_images(val, reader, number, names, depth, by_name=by_name),
        digest=facts.digest,
        skipped=skipped,
        numbered_by_name=by_name and info.class_names is None,
        notes=(*notes, *depth_notes(depth, facts.checked)),
    )


def _shards(root: str) -> tuple[_Info, list[Shard], list[Shard]]:
    """What the info file says, and the shards for training and validation."""
    listed = root.endswith(".tar") or "{" in root
    if not listed and not is_url(root) and not os.path.isdir(root):
        raise UserError(
            f"No folder of shards at {root}.",
            fix="Give wds:DIR, tar files as wds:train-{000..146}.tar, or a URL that fsspec reads.",
        )
    info = _Info() if listed else _read_info(root)
    below = listed_in(root)
    train, val = (_shards_of(root, info, below, names) for names in (TRAIN_NAMES, VAL_NAMES))
    if not train and not val:
        train = below
    if not train:
        raise UserError(
            f"No training shards in {root}.",
            fix="Name the shards *train*.tar and *val*.tar, or list them as splits train and validation in _info.json.",
        )
    return info, train, val


def _reader(shards: dict[Shard, str], samples: int) -> ShardReader:
    """Fetched shards are kept for as long as training may want them: twice its buffer."""
    return ShardReader([shard.place for shard in shards], 2 * SHUFFLE_BUFFER * len(shards) // max(samples, 1) + 2)


def _images(
    samples: list[Sample],
    reader: ShardReader,
    number_of: dict[Shard, int],
    names: tuple[str, ...] | None,
    depth: Depth,
    *,
    by_name: bool,
) -> Images:
    shards = array("i", (number_of[sample.shard] for sample in samples))
    offsets, sizes = (array("q", values) for values in ((s.offset for s in samples), (s.size for s in samples)))
    said = PackedTexts(str(sample) for sample in samples)

    def read(index: int) -> Image.Image:
        try:
            content = reader.read(shards[index], offsets[index], sizes[index])
            if len(content) < sizes[index]:
                raise ValueError(f"the shard ends after {len(content)} of {sizes[index]} bytes of it")
            return load_rgb(content, depth)
        except DECODING_ERRORS as error:
            raise UserError(
                f"Cannot read the image {said[index]}: {error}.",
                why="It was not among those checked when the shards were opened, or its shard has changed since.",
                fix="Put the shard back as it was and give the same command again, or repair it and start again.",
            ) from None

    number = {name: label for label, name in enumerate(names or ())}
    labels = (sample.label for sample in samples)
    numbers = [UNLABELLED if x is None else number[x] if by_name else int(x) for x in labels]
    return Images(numbers, read, runs=[len([*run]) for _, run in groupby(shards)])


def _read_info(root: str) -> _Info:
    if not is_url(root):
        path = next((Path(root) / name for name in _INFO_NAMES if (Path(root) / name).exists()), None)
        return _Info() if path is None else read_document(path, _Info, fix="Repair or remove the file.")
    for name in _INFO_NAMES:
        if (text := read_text_at(root, name)) is not None:
            return parse_document(text, f"{root}/{name}", _Info, fix="Repair or remove the file.")
    return _Info()


def _shards_of(root: str, info: _Info, below: list[Shard], names: tuple[str, ...]) -> list[Shard]:
    """Shards of a split: those listed in the info file, or else those whose path below `root` tells."""
    listed = next((info.splits[name].filenames for name in names if name in info.splits), None)
    if listed is not None:
        return [Shard(f"{root.rstrip('/')}/{name}", name) for name in listed]
    of_name = ([shard for shard in below if name in shard.name.lower()] for name in names)
    return next((shards for shards in of_name if shards), [])


def _indexed(
    marks: dict[Shard, str], asked: tuple[str | None, str | None], opened_ns: int, *, recheck: bool, quiet: bool
) -> dict[Shard, list[Sample]]:
    """The samples of every shard; what was found before is remembered."""

    def look(shard: Shard) -> list[Sample] | ShortShardError:
        name, mark = f"shard\0{shard.place}\0{asked}", marks[shard]
        known = None if recheck else recalled(name, _Index)
        if known is not None and known.mark == mark:
            at_and_size = (place.split(" ") for place in known.places)
            rows = zip(known.members, at_and_size, known.labels, strict=False)
            return [Sample(shard, member, int(at), int(size), label) for member, (at, size), label in rows]
        try:
            found = samples_in(shard, *asked)
        except ShortShardError as error:
            return error
        if _is_settled(shard, opened_ns):
            members, places = [one.member for one in found], [f"{one.offset} {one.size}" for one in found]
            labels = tuple(one.label for one in found)
            keep_document(name, _Index(mark=mark, members=tuple(members), labels=labels, places=tuple(places)))
        return found

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        looked = list(watched(pool.map(look, marks), "looking through shards", quiet=quiet, total=len(marks)))
    short = [error for error in looked if isinstance(error, ShortShardError)]
    if short:
        raise UserError(
            f"{len(short)} of {len(looked)} shards end early: {short[0]}" + (", ..." if len(short) > 1 else "."),
            why="They were not written or copied to their end, and samples would be missing without a word.",
            fix="Copy or write them again. Whole tar files end with a block of zeros.",
        )
    return {shard: found for shard, found in zip(marks, looked, strict=True) if not isinstance(found, ShortShardError)}


def _is_settled(shard: Shard, opened_ns: int) -> bool:
    mark = None if shard.is_remote else mark_of(shard.place)
    return shard.is_remote or (mark is not None and is_settled(mark, opened_ns))


def _facts(
    samples: list[Sample],
    reader: ShardReader,
    shards: tuple[list[Shard], list[Shard]],
    marks: dict[Shard, str],
    asked: tuple[str | None, str | None],
    opened_ns: int,
    *,
    recheck: bool,
    quiet: bool,
) -> _Facts:
    """What is known of the pictures in shards that are as they were, or what is found out now."""
    key = repr((asked, [[(shard.place, shard.name, marks[shard]) for shard in split] for split in shards]))
    known = None if recheck else recalled(key, _Facts)
    if known is not None:
        return known
    unreadable, depth, checked = _check(samples, reader, list(marks), quiet=quiet)
    facts = _Facts(
        unreadable=tuple(unreadable),
        whole=depth.whole,
        real=depth.real,
        checked=checked,
        digest=_digest(*shards, marks, *asked, depth, quiet=quiet),
    )
    if all(_is_settled(shard, opened_ns) for shard in marks):
        keep_document(key, facts)
    return facts


def _check(
    samples: list[Sample], reader: ShardReader, shards: list[Shard], *, quiet: bool
) -> tuple[list[int], Depth, int]:
    """Numbers of the unreadable ones, the range of those with more than 8 bits, and how many were looked at."""
    limit = REMOTE_CHECK_LIMIT if any(shard.is_remote for shard in shards) else FULL_CHECK_LIMIT
    chosen = range(0, len(samples), max(1, -(-len(samples) // limit)))
    number = {shard: position for position, shard in enumerate(shards)}
    depths = [
        depth_in(reader.read(number[one.shard], one.offset, one.size))
        for one in watched((samples[at] for at in chosen), "checking images", quiet=quiet, total=len(chosen))
    ]
    unreadable = [at for at, depth in zip(chosen, depths, strict=True) if depth is None]
    return unreadable, deepest(depth for depth in depths if depth is not None), len(chosen)


def _class_names(info: _Info, samples: list[Sample], root: str) -> tuple[tuple[str, ...] | None, bool]:
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
    train: list[Shard],
    val: list[Shard],
    marks: dict[Shard, str],
    image_key: str | None,
    label_column: str | None,
    depth: Depth,
    *,
    quiet: bool,
) -> str:
    """sha256 over split, relative path and content of each shard, and how samples are read where that is not usual. Of
    a remote shard, what its file system calls a key of the content stands for that."""
    asked = repr((image_key, label_column)) if image_key or label_column else ""
    digest = hashlib.sha256((asked + ("" if depth == Depth() else repr(depth))).encode())
    both = [*(("train", shard) for shard in train), *(("val", shard) for shard in val)]
    for split, shard in watched(both, "reading shards", quiet=quiet):
        digest.update(f"{split}\0{shard.name}\0{shard.size()}\n".encode(errors="surrogateescape"))
        if shard.is_remote:
            digest.update(f"{marks[shard]}\n".encode())
            continue
        with shard.open() as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
