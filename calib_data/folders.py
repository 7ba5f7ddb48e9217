"""Image folders: class folders with or without a split, or pictures without labels."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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


def open_folder(spec: str, root: Path, *, known: Collection[str] = (), quiet: bool = True) -> DataSource:
    """Opens the image folder `root`.

    Args:
        known: names of the network's classes or of a class map; where they cover all class folders, the splits may
            have different ones.

    Raises:
        UserError: it is missing, unreadable, empty or inconsistent.
    """
    return open_files(spec, root, _find_splits(root), known, quiet=quiet)


def _find_splits(root: Path) -> Splits:
    """Training and validation files; no validation files where the folder has no labelled split of its own."""
    if not root.is_dir():
        raise UserError(
            f"No image folder at {root}" + (": it is a file." if root.exists() else "."),
            fix=f"Give an existing folder. {LAYOUTS}",
        )
    place = _unwrapped(root)
    folders = {path.name.lower(): path for path in _children(place) if path.is_dir()}
    train_root = next((folders[name] for name in TRAIN_NAMES if name in folders), place)
    train = _labelled_files(_unwrapped(train_root))
    if not train:
        raise UserError(f"No images in {train_root}.", why=f"Looked for {' '.join(sorted(EXTENSIONS))}.", fix=LAYOUTS)
    if train_root == place:
        return Splits(train, [])
    classes = {file.class_name for file in train}
    notes: list[str] = []
    for folder in (folders[name] for name in VAL_NAMES if name in folders):
        val = _labelled_files(_unwrapped(folder))
        if not val:
            raise UserError(f"No images in {folder}.", fix="Put validation images there, or remove the folder.")
        if folder.name.lower() != "test" or not _is_unlabelled(val, classes):
            return Splits(train, val, notes=tuple(notes))
        notes.append(f"{folder.name}: its {len(val)} images have no labels and were left out.")
    return Splits(train, [], notes=tuple(notes))


def _is_unlabelled(files: list[File], classes: set[str | None]) -> bool:
    """Whether a split beside a labelled one has loose pictures, or all of them in a folder that is no class."""
    found = {file.class_name for file in files}
    return None not in classes and len(found) == 1 and not found & classes


def _unwrapped(root: Path) -> Path:
    """The folder itself, or the one within it that all pictures are in, as archives leave it: DIR/DIR/CLASS/*.jpg."""
    for _ in range(_DEEPEST):
        children = _children(root)
        filled = [path for path in children if path.is_dir() and any(True for _ in _walk(path, frozenset()))]
        loose = any(_is_image(path) and not path.is_dir() for path in children)
        if loose or len(filled) != 1 or filled[0].name.lower() in (*TRAIN_NAMES, *VAL_NAMES):
            return root
        if not any(path.is_dir() for path in _children(filled[0])) or any(map(_is_image, _children(filled[0]))):
            return root
        root = filled[0]
    return root


def _labelled_files(root: Path) -> list[File]:
    """The files of one split. Its direct subfolders are the classes; without any, its own pictures are unlabelled."""
    loose, files = [], []
    for path in _children(root):
        if path.is_dir():
            files += [File(entry, path.name) for entry in _walk(path, frozenset())]
        elif _is_image(path):
            loose.append(File(path, None))
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
    return path.suffix.lower() in PICTURES
