"""Image folders: class folders with or without a split, or pictures without labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from upvits.calib_data.classes import natural_order
from upvits.calib_data.datasets import UNLABELLED, DataSource, Images
from upvits.calib_data.decoding import DECODING_ERRORS, EXTENSIONS, is_readable, load_rgb, read_picture
from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import watched

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "eval", "test")
MAX_UNREADABLE_SHARE = 0.01
VAL_SHARE = 0.2

FULL_CHECK_LIMIT = 20_000
"""Up to this many files are all decoded and hashed when a folder is opened; of more, an even sample of this size."""

LAYOUTS = (
    "Expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg (split 80/20), "
    "or DIR/*.jpg for pictures without labels."
)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    class_name: str | None


def open_folder(spec: str, root: Path, *, known: Collection[str] = (), quiet: bool = True) -> DataSource:
    """Opens the image folder `root`.

    Args:
        known: names of the network's classes or of a class map; where they cover all class folders, the splits may
            have different ones.

    Raises:
        UserError: it is missing, unreadable, empty or inconsistent.
    """
    train, val = _find_splits(root)
    files = [*train, *val]
    unreadable, hashes = _check(files, quiet=quiet)
    skipped = tuple(str(file.path) for file in unreadable)
    refuse_many_unreadable(skipped, len(files), root)
    bad = set(unreadable)
    train, val = ([file for file in split if file not in bad] for split in (train, val))
    class_names = _class_names(train, val, root, known)
    if not val:
        train, val = _split_by_hash(train, root)
    label_of = {name: label for label, name in enumerate(class_names or ())}
    return DataSource(
        spec=spec,
        class_names=class_names,
        train=_images(train, label_of),
        val=_images(val, label_of),
        digest=_digest(train, val, root, hashes),
        skipped=skipped,
        numbered_by_name=True,
    )


def _images(files: list[_File], label_of: dict[str, int]) -> Images:
    paths = [file.path for file in files]
    labels = [UNLABELLED if file.class_name is None else label_of[file.class_name] for file in files]

    def read(index: int) -> Image.Image:
        try:
            return load_rgb(paths[index])
        except DECODING_ERRORS as error:
            raise UserError(
                f"Cannot read the image {paths[index]}: {error}.",
                why="It was not among the files checked when the folder was opened, or has changed since.",
                fix="Repair or remove the file and start again.",
            ) from None

    return Images(labels, read)


def _find_splits(root: Path) -> tuple[list[_File], list[_File]]:
    """Training and validation files; no validation files where the folder has no split of its own."""
    if not root.is_dir():
        raise UserError(
            f"No image folder at {root}" + (": it is a file." if root.exists() else "."),
            fix=f"Give an existing folder. {LAYOUTS}",
        )
    folders = {path.name.lower(): path for path in _children(root) if path.is_dir()}
    train_root = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    val_root = next((folders[name] for name in VAL_NAMES if name in folders), None)
    if train_root is None:
        train, val = _labelled_files(root), []
    else:
        train, val = _labelled_files(train_root), _labelled_files(val_root) if val_root else []
        if val_root and not val:
            raise UserError(f"No images in {val_root}.", fix="Put validation images there, or remove the folder.")
    if not train:
        raise UserError(f"No images in {train_root or root}.", why=f"Looked for {_extensions()}.", fix=LAYOUTS)
    return train, val


def _labelled_files(root: Path) -> list[_File]:
    """The files of one split. Its direct subfolders are the classes; without any, its own pictures are unlabelled."""
    loose, files = [], []
    for path in _children(root):
        if path.is_dir():
            files += [_File(entry, path.name) for entry in _walk(path, frozenset())]
        elif _is_image(path):
            loose.append(_File(path, None))
    if loose and files:
        raise UserError(
            f"{len(loose)} images lie beside the class folders in {root}, for example {loose[0].path.name}.",
            why="They have no class, the others have one.",
            fix="Move them into class folders, or point to a folder with one kind only.",
        )
    return loose or files


def _walk(folder: Path, above: frozenset[Path]) -> Iterable[Path]:
    """Image files at any depth, links followed, but no folder within itself."""
    above = above | {folder.resolve()}
    for path in _children(folder):
        if path.is_dir():
            if path.resolve() not in above:
                yield from _walk(path, above)
        elif _is_image(path):
            yield path


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {folder}: {error.strerror or error}.",
            fix="Check its permissions, or point to another folder.",
        ) from None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _extensions() -> str:
    return " ".join(sorted(EXTENSIONS))


def _class_names(train: list[_File], val: list[_File], root: Path, known: Collection[str]) -> tuple[str, ...] | None:
    """Class names in timm's order, the same in both splits unless all of them are known; None without labels."""
    in_train, in_val = ({file.class_name for file in split} for split in (train, val))
    if val and in_train != in_val and not in_train | in_val <= set(known):
        only_train = [name or "(unlabelled)" for name in in_train - in_val]
        only_val = [name or "(unlabelled)" for name in in_val - in_train]
        raise UserError(
            f"Training and validation images in {root} have different classes: "
            + "; ".join(
                f"only in {split}: {_shortened(names)}"
                for split, names in (("training", only_train), ("validation", only_val))
                if names
            )
            + ".",
            why="Labels are positions in the list of class folders, so both splits need the same list.",
            fix="Add the missing class folders with images, remove the extra ones, or number all classes with "
            "`class_map=`.",
        )
    names = natural_order(name for name in in_train | in_val if name is not None)
    if len(names) == 1:
        raise UserError(
            f"Only one class folder with images in {root}: {names[0]}.",
            why="With a single class every model is always right, so nothing can be measured.",
            fix=f"For pictures without labels point to that folder itself. {LAYOUTS}",
        )
    return names or None


def _shortened(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check(files: list[_File], *, quiet: bool) -> tuple[list[_File], dict[Path, str]]:
    """Decodes and hashes the files (an even sample of very many). Returns the unreadable ones and hashes by path."""
    step = max(1, -(-len(files) // FULL_CHECK_LIMIT))

    def inspect(file: _File) -> str | None:
        try:
            data = read_picture(file.path)
        except UserError:  # a pipe, a device, a dead link
            return None
        return hashlib.sha256(data).hexdigest() if is_readable(data) else None

    sample = files[::step]
    # Pillow decodes outside the interpreter lock, so threads do.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        hashes = list(watched(pool.map(inspect, sample), "checking images", quiet=quiet, total=len(sample)))
    unreadable = [file for file, value in zip(sample, hashes, strict=True) if value is None]
    return unreadable, {file.path: value for file, value in zip(sample, hashes, strict=True) if value is not None}


def refuse_many_unreadable(skipped: tuple[str, ...], total: int, root: Path) -> None:
    if len(skipped) > MAX_UNREADABLE_SHARE * total:
        raise UserError(
            f"{len(skipped)} of {total} images in {root} cannot be read, for example {skipped[0]}.",
            why=f"More than {MAX_UNREADABLE_SHARE:.0%} of unreadable images means that the data set is damaged.",
            fix="Repair or remove these files: " + _shortened(list(skipped)),
        )


def _split_by_hash(files: list[_File], root: Path) -> tuple[list[_File], list[_File]]:
    """A fixed fifth of each class for validation, chosen by the hashes of the relative paths.

    A single picture of a class is for training; a single unlabelled picture serves as both.
    """
    by_class: dict[str | None, list[_File]] = {}
    for file in files:
        by_class.setdefault(file.class_name, []).append(file)
    val: set[_File] = set()
    for members in by_class.values():
        ranked = sorted(members, key=lambda file: _hash(_relative(file, root)))
        val.update(ranked[: max(1, round(VAL_SHARE * len(ranked)))] if len(ranked) > 1 else [])
    train = [file for file in files if file not in val]
    return train, [file for file in files if file in val] or train


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _relative(file: _File, root: Path) -> str:
    return file.path.relative_to(root).as_posix()


def _digest(train: list[_File], val: list[_File], root: Path, hashes: dict[Path, str]) -> str:
    """sha256 over split, relative path, class, size and (where it was read) content of every file."""
    digest = hashlib.sha256()
    for split, files in (("train", train), ("val", val)):
        for file in files:
            size = file.path.stat().st_size
            line = (split, _relative(file, root), str(file.class_name), str(size), hashes.get(file.path, ""))
            digest.update("\0".join(line).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()
