"""Paths that stand in documents, and files that are written: nothing outside of a folder is touched.

Runs, packages and data sets travel between people. What their documents name may lie below the document's folder and
nowhere else.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular

_LONGEST, _LONGEST_PART = 1024, 255
"""Bytes of a path in a document, and of one part of it: file systems have no longer names."""


def relative_path(text: str) -> str:
    """A path below a folder in its shortest form, with `/` between its parts.

    Links on the way are not looked at (see `path_inside`): in a data set they may lead anywhere, as they do in the
    caches of model hubs and of version control for data.

    Raises:
        ValueError: it is empty or absolute, has a part `..`, a control character or a backslash, or is too long.

    >>> relative_path("pruned/./model.onnx")
    'pruned/model.onnx'
    """
    path = PurePosixPath(text)
    too_long = len(os.fsencode(text)) > _LONGEST or any(len(os.fsencode(part)) > _LONGEST_PART for part in path.parts)
    if too_long or "\\" in text or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("this is no path of a file: it is too long, or has a backslash or a control character")
    if path.is_absolute() or Path(text).drive or not path.parts or ".." in path.parts:
        raise ValueError(f"{text!r} is outside of the folder, or names no file")
    return path.as_posix()


RelativePath = Annotated[str, AfterValidator(relative_path)]
"""Type of an entry that names a file below the document's folder."""


def path_inside(folder: Path, name: str) -> Path:
    """The path of this name below a folder; nothing need be there.

    Args:
        folder: may itself be reached through links.
        name: as it stands in a document.

    Raises:
        UserError: the name, or a link on the way, leads out of the folder.
    """
    fix = "Get the folder again from where it came from, or make it again."
    try:
        path = folder / relative_path(name)
        inside = path.resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{folder} names a file that cannot be in it.", why=f"{error}.", fix=fix) from error
    if not inside:
        raise UserError(f"{path} is outside of {folder}.", why="A link on the way leads out of the folder.", fix=fix)
    return path


def copy_regular(source: Path, target: Path) -> None:
    """Copy a regular file to a new one; the folders on the way to it are made.

    Raises:
        UserError: `source` is no regular file (a pipe would wait for ever).
        FileExistsError: there is something at `target`, be it a link.
    """
    require_regular(source, fix="Put the file itself there.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("xb") as written:
        shutil.copyfileobj(read, written, 1 << 20)


def write_new(path: Path, text: str) -> None:
    """Write a new text file; raises FileExistsError where there is something, be it a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def share(path: Path) -> None:
    """Give a file or folder that was made for this user alone the permissions that new ones usually get."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
