"""Picture files with the names of their classes, made into a data set: checked, split and numbered."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from upvits.calib_data.classes import natural_order
from upvits.calib_data.datasets import UNLABELLED, DataSource, Images
from upvits.calib_data.decoding import DECODING_ERRORS, advice_on_formats, depth_in, load_rgb, read_picture
from upvits.calib_data.depth import Depth, deepest, depth_notes
from upvits.calib_data.errors import UserError
from upvits.calib_data.packed import PackedTexts
from upvits.calib_data.progress import progress_bar
from upvits.calib_data.remembered import Seen, mark_of, recall, remember

T = TypeVar("T", bound=Hashable)
R = TypeVar("R")

MAX_UNREADABLE_SHARE = 0.01
VAL_SHARE = 0.2

FULL_CHECK_LIMIT = 20_000
"""Up to this many files are all decoded and hashed when a folder is opened; of more, an even sample of this size."""

_AT_ONCE = 64
"""Files that a thread looks at before it takes the next ones."""


class File(NamedTuple):
    """A picture; `class_name` None: it has no label."""

    path: str
    class_name: str | None


@dataclass(frozen=True, slots=True)
class Splits:
    """Files for training and validation; no validation files: a fifth of the others is taken.

    Attributes:
        numbered: whether the classes are called by their numbers, 0 to n-1, so that nothing is left to find out.
        notes: what was left out, and why.
    """

    train: list[File]
    val: list[File]
    numbered: bool = False
    notes: tuple[str, ...] = ()


def open_files(
    spec: str, root: Path, splits: Splits, known: Collection[str], *, quiet: bool, recheck: bool = False
) -> DataSource:
    """The data set of these files.

    Args:
        root: folder that the files lie below.
        known: names of the network's classes or of a class map; where they cover all classes, the splits may have
            different ones.
        recheck: nothing that is remembered of the files is believed.

    Raises:
        UserError: many files, or all of a class, are unreadable; the classes of the splits differ; there is only one.
    """
    train, val = splits.train, splits.val
    files = [*train, *val]
    paths = [file.path for file in files]
    sizes = dict(zip(paths, _in_threads(_size_of, paths, "looking for images", quiet=quiet), strict=True))
    found = _found_out(spec, root, paths, quiet=quiet, recheck=recheck)
    bad = {path for seen in (sizes, found) for path, known in seen.items() if known is None}
    skipped = tuple(path for path in paths if path in bad)
    hashes = {path: seen.sha256 for path, seen in found.items() if seen is not None}
    depth = deepest(seen.depth for seen in found.values() if seen is not None)
    refuse_many_unreadable(skipped, len(files), root)
    for split in (train, val):
        refuse_lost_classes(
            [file.class_name for file in split], [f.class_name for f in split if f.path not in bad], skipped
        )
    train, val = ([file for file in split if file.path not in bad] for split in (train, val))
    class_names = _class_names(train, val, root, known)
    if not val:
        train, val = split_by_hash(
            train, [file.class_name for file in train], _relative((file.path for file in train), root)
        )
    label_of = {name: label for label, name in enumerate(class_names or ())}
    return DataSource(
        spec=spec,
        class_names=class_names,
        train=_images(train, label_of, depth),
        val=_images(val, label_of, depth),
        digest=_digest(train, val, root, sizes, hashes, depth),
        skipped=skipped,
        numbered_by_name=not splits.numbered,
        notes=(*splits.notes, *depth_notes(depth, len(hashes))),
    )


def _images(files: list[File], label_of: dict[str, int], depth: Depth) -> Images:
    paths = PackedTexts(file.path for file in files)
    labels = [UNLABELLED if file.class_name is None else label_of[file.class_name] for file in files]

    def read(index: int) -> Image.Image:
        try:
            return load_rgb(Path(paths[index]), depth)
        except UserError as error:
            if os.path.exists(paths[index]):
                raise
            raise UserError(
                f"The image {paths[index]} is gone.",
                why="It was there when the data were opened.",
                fix="Put it back and give the same command again: it goes on from what it has.",
            ) from error
        except DECODING_ERRORS as error:
            raise UserError(
                f"Cannot read the image {paths[index]}: {error}.",
                why="It was not among the files checked when the folder was opened, or has changed since.",
                fix="Repair or remove the file and start again.",
            ) from None

    return Images(labels, read)


def _class_names(train: list[File], val: list[File], root: Path, known: Collection[str]) -> tuple[str, ...] | None:
    """Class names in timm's order, the same in both splits unless all of them are known; None without labels."""
    in_train, in_val = ({file.class_name for file in split} for split in (train, val))
    if val and in_train != in_val and not in_train | in_val <= set(known):
        only_train = [name or "(unlabelled)" for name in in_train - in_val]
        only_val = [name or "(unlabelled)" for name in in_val - in_train]
        raise UserError(
            f"Training and validation images in {root} have different classes: "
            + "; ".join(
                f"only in {split}: {shortened(names)}"
                for split, names in (("training", only_train), ("validation", only_val))
                if names
            )
            + ".",
            why="Labels are positions in the list of classes, so both splits need the same list.",
            fix="Add images of the missing classes, remove the extra ones, or number all classes with `class_map=`.",
        )
    names = natural_order(name for name in in_train | in_val if name is not None)
    if len(names) == 1:
        raise UserError(
            f"Only one class with images in {root}: {names[0]}.",
            why="With a single class every model is always right, so nothing can be measured.",
            fix="For pictures without labels point to the folder that holds them.",
        )
    return names or None


def shortened(names: Collection[str]) -> str:
    """The first five in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _found_out(spec: str, root: Path, paths: Sequence[str], *, quiet: bool, recheck: bool) -> dict[str, Seen | None]:
    """What is in the files, by path; of very many, in an even sample. None: the file cannot be read."""
    paths = paths[:: max(1, -(-len(paths) // FULL_CHECK_LIMIT))]
    path_of = dict(zip(_relative(paths, root), paths, strict=True))
    opened_ns = time.time_ns()
    marks = {name: mark for name, path in path_of.items() if (mark := mark_of(path)) is not None}
    known = {} if recheck else recall(spec, root, marks)
    left = [name for name in path_of if name not in known]
    if left:
        looked_at = _in_threads(_look, [path_of[name] for name in left], "checking images", quiet=quiet)
        known |= dict(zip(left, looked_at, strict=True))
        remember(spec, root, marks, known, opened_ns)
    return {path: known[name] for name, path in path_of.items()}


def _size_of(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _look(path: str) -> Seen | None:
    try:
        data = read_picture(Path(path))
    except UserError:  # a pipe, a device
        return None
    depth = depth_in(data)
    return None if depth is None else Seen(hashlib.sha256(data).hexdigest(), depth)


def _in_threads(look: Callable[[str], R], paths: Sequence[str], title: str, *, quiet: bool) -> list[R]:
    """What `look` says of each file. Pillow decodes, and the system waits for disks, outside the interpreter's lock."""
    parts = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
    found: list[R] = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, progress_bar(quiet=quiet) as progress:
        task = progress.add_task(title, total=len(paths))
        for part in pool.map(lambda part: [look(path) for path in part], parts):
            found += part
            progress.advance(task, len(part))
    return found


def refuse_many_unreadable(skipped: Sequence[str], total: int, root: Path) -> None:
    """Raises UserError where more than a hundredth of the images cannot be read."""
    if len(skipped) > MAX_UNREADABLE_SHARE * total:
        raise UserError(
            f"{len(skipped)} of {total} images in {root} cannot be read, for example {skipped[0]}.",
            why=f"More than {MAX_UNREADABLE_SHARE:.0%} of unreadable images means that the data set is damaged, or in "
            "a format that is not read.",
            fix=advice_on_formats(skipped) or "Repair or remove these files: " + shortened(skipped),
        )


def refuse_lost_classes(before: Sequence[T], after: Sequence[T], skipped: Sequence[str]) -> None:
    """Raises UserError where no image of a class can be read."""
    lost = sorted({str(name) for name in set(before) - set(after)})
    if lost:
        raise UserError(
            f"No image of {shortened(lost)} can be read.",
            why="A class would be missing without a word.",
            fix=advice_on_formats(skipped) or "Repair these files: " + shortened(skipped),
        )


def split_by_hash(items: Sequence[T], labels: Sequence[Hashable], names: Sequence[str]) -> tuple[list[T], list[T]]:
    """Training and validation: a fixed fifth of each label for validation, chosen by the hashes of the names.

    A single picture of a class is for training; a single unlabelled picture serves as both.
    """
    by_label: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    chosen: set[int] = set()
    for members in by_label.values():
        ranked = sorted(members, key=lambda index: _hash(names[index]))
        chosen.update(ranked[: max(1, round(VAL_SHARE * len(ranked)))] if len(ranked) > 1 else [])
    train = [item for index, item in enumerate(items) if index not in chosen]
    return train, [item for index, item in enumerate(items) if index in chosen] or train


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _relative(paths: Iterable[str], root: Path) -> list[str]:
    """The paths from the root, with `/`."""
    start = os.path.join(root, "")
    return [path.removeprefix(start).replace(os.sep, "/") for path in paths]


def _digest(
    train: list[File],
    val: list[File],
    root: Path,
    sizes: Mapping[str, int | None],
    hashes: Mapping[str, str],
    depth: Depth,
) -> str:
    """sha256 over split, relative path, class, size and (where it was read) content of every file, and the range."""
    digest = hashlib.sha256(b"" if depth == Depth() else repr(depth).encode())
    for split, files in (("train", train), ("val", val)):
        names = _relative((file.path for file in files), root)
        for file, name in zip(files, names, strict=True):
            line = (split, name, str(file.class_name), str(sizes[file.path]), hashes.get(file.path, ""))
            digest.update("\0".join(line).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()
