"""Where a page may be written: nothing of the user's is lost to it."""

from __future__ import annotations

from pathlib import Path

from upvits.calib_data.documents import read_regular
from upvits.calib_data.errors import UserError


def check_page_place(path: Path, mark: str, what: str) -> None:
    """Refuse a place where a page would overwrite something else.

    Args:
        mark: what is in every page of this kind, e.g. its generator.
        what: the page, for messages: "comparison of runs".

    Raises:
        UserError: it is no `.html` file, its folder does not exist, or this file exists and is no such page.
    """
    if path.suffix != ".html":
        raise UserError(f"{path} cannot hold a {what}.", why="It is a page in HTML.", fix="End its name in .html.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent}.", fix="Make it first, or choose another --output.")
    if (path.exists() or path.is_symlink()) and not _has(path, mark):
        raise not_ours(path, what)


def not_ours(path: Path, what: str) -> UserError:
    """The error about a file that would be lost."""
    return UserError(
        f"{path} exists and is no {what}.",
        why="Writing one there would overwrite something of yours.",
        fix="Choose another --output, or move this file away.",
    )


def _has(path: Path, mark: str) -> bool:
    try:
        return mark.encode() in read_regular(path, fix="", largest=1 << 30)
    except UserError:
        return False
