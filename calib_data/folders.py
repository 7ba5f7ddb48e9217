"""Image folders: class folders with or without a split, or pictures without labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from upvits.calib_data.datasets import DataSource
from upvits.calib_data.decoding import EXTENSIONS, PICTURES
from upvits.calib_data.errors import UserError
from upvits.calib_data.labelled import File, Splits, open_files

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "eval", "test")

LAYOUTS = (
    "Expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg (split 80/20), "
    "or DIR/*.jpg for pictures without labels."
)

_DEEPEST = 3
"""So many folders may lie around the class folders."""


def open_folder(
    spec: str, root: Path, *, known: Collection[str] = (), quiet: bool = True, recheck: bool = False
) -> DataSource:
    """Opens the image folder `root`.

    Args:
        known: names of the network's classes or of a class map; where they cover all class folders, the splits may
            have different ones.
        recheck: see `open_files`.

    Raises:
        UserError: it is missing, unreadable, empty or inconsistent.
    """
    return open_files(spec, root, _find_splits(root), known, quiet=quiet, recheck=recheck)


def _find_splits(root: Path) -> Splits:
    """Training and validation files; no validation files where the folder has no labelled split of its own."""
    if not root.is_dir():
        raise UserError(
            f"No image folder at {root}" + (": it is a file." if root.exists() else "."),
            fix=f"Give an existing folder. {LAYOUTS}",
        )
    place = _unwrapped(str(root))
    folders = {entry.name.lower(): entry.path for entry in _children(place) if _is_folder(entry)}
    train_root = next((folders[name] for name in TRAIN_NAMES if name in folders), place)
    train = _labelled_files(_unwrapped(train_root))
    if not train:
        raise UserError(f"No images in {train_root}.", why=f"Looked for {' '.join(sorted(EXTENSIONS))}.", fix=LAYOUTS)
    if train_root == place:
        return Splits(train, [])
    classes = {file.class_name for file in train}
    notes: list[str] = []
    for name in (name for name in VAL_NAMES if name in folders):
        val = _labelled_files(_unwrapped(folders[name]))
        if not val:
            raise UserError(f"No images in {folders[name]}.", fix="Put validation images there, or remove the folder.")
        if name != "test" or not _is_unlabelled(val, classes):
            return Splits(train, val, notes=tuple(notes))
        folder = os.path.basename(folders[name])
        notes.append(f"{folder}: its {len(val)} images have no labels and were left out.")
    return Splits(train, [], notes=tuple(notes))


def _is_unlabelled(files: list[File], classes: set[str | None]) -> bool:
    """Whether a split beside a labelled one has loose pictures, or all of them in a folder that is no class."""
    found = {file.class_name for file in files}
    return None not in classes and len(found) == 1 and not found & classes


def _unwrapped(root: str) -> str:
    """The folder itself, or the one within it that all pictures are in, as archives leave it: DIR/DIR/CLASS/*.jpg."""
    for _ in range(_DEEPEST):
        children = _children(root)
        filled = [entry for entry in children if _is_folder(entry) and any(True for _ in _walk(entry.path))]
        loose = any(_is_image(entry) and not _is_folder(entry) for entry in children)
        if loose or len(filled) != 1 or filled[0].name.lower() in (*TRAIN_NAMES, *VAL_NAMES):
            return root
        inner = _children(filled[0].path)
        if not any(map(_is_folder, inner)) or any(map(_is_image, inner)):
            return root
        root = filled[0].path
    return root


def _labelled_files(root: str) -> list[File]:
    """The files of one split. Its direct subfolders are the classes; without any, its own pictures are unlabelled."""
    loose, files = [], []
    for entry in _children(root):
        if _is_folder(entry):
            files += [File(path, entry.name) for path in _walk(entry.path)]
        elif _is_image(entry):
            loose.append(File(entry.path, None))
    if loose and files:
        raise UserError(
            f"{len(loose)} images lie beside the class folders in {root}, for example "
            f"{os.path.basename(loose[0].path)}.",
            why="They have no class, the others have one.",
            fix="Move them into class folders, or point to a folder with one kind only.",
        )
    return loose or files


def _walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of image files at any depth, links followed, but no folder within itself."""
    above = above | {os.path.realpath(folder)}
    for entry in _children(folder):
        if _is_folder(entry):
            if os.path.realpath(entry.path) not in above:
                yield from _walk(entry.path, above)
        elif _is_image(entry):
            yield entry.path


def _children(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {folder}: {error.strerror or error}.",
            fix="Check its permissions, or point to another folder.",
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """The system told it with the name; only links are looked at."""
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    stem, _, ending = entry.name.rpartition(".")
    return bool(stem) and f".{ending.lower()}" in PICTURES
