"""The pictures that somebody named: files, and what is in folders."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from upvits.calib_data.decoding import DECODING_ERRORS, EXTENSIONS, depth_in, load_rgb, read_picture
from upvits.calib_data.depth import Depth, deepest, depth_notes
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.printable import printable

_LOGGER = logging.getLogger(__name__)

_LOOKED_AT = 512
"""Pictures that are decoded to find the range of their values."""


def pictures_in(paths: Sequence[Path]) -> list[Path]:
    """Files as they were named, and the pictures at any depth of folders in the order of their names; each once.

    Raises:
        UserError: a folder has no pictures, a file is not there, or nothing was named.
    """
    found: list[Path] = []
    for path in map(user_path, paths):
        if not path.exists():
            is_address = re.match(r"(https?|s3|gs):/", str(path)) is not None
            raise UserError(
                f"There is no picture {path}.",
                why="It is an address, and nothing is fetched from the network." if is_address else "",
                fix="Download it, and give the file." if is_address else "Name picture files, or folders of them.",
            )
        inside = _below(path) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"There are no pictures in {path}.", why=f"Looked for {' '.join(sorted(EXTENSIONS))}.")
        found += inside
    if not found:
        raise UserError("No pictures were named.", fix="Name picture files, or folders of them.")
    return list(dict.fromkeys(found))


def _below(folder: Path) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kept = (name for name in sorted(names) if not name.startswith("."))
        files += [Path(place, name) for name in kept if Path(name).suffix.lower() in EXTENSIONS]
    return files


def common_depth(paths: Sequence[Path]) -> Depth:
    """The range of those with more than 8 bits, found on some of them: two pictures of a set have one scale."""
    found = []
    for path in paths[:: max(1, len(paths) // _LOOKED_AT)]:
        with suppress(UserError):
            found.append(depth_in(read_picture(path)))
    depth = deepest(one for one in found if one is not None)
    for note in depth_notes(depth, len(found)):
        _LOGGER.info(note)
    return depth


def read(path: Path, depth: Depth) -> Image.Image | str:
    """The picture in a file as RGB, or why it cannot be read."""
    try:
        return load_rgb(path, depth)
    except UserError as error:
        return printable(" ".join(part for part in (error.what, error.why) if part), 200)
    except UnidentifiedImageError:
        return "It is no picture in a known format."
    except DECODING_ERRORS as error:
        return printable(str(error) or type(error).__name__, 200)
