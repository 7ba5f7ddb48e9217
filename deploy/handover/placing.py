"""A folder that appears at its place whole or not at all, and in which nothing of a killed attempt stays behind."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upvits.calib_data.paths import share
from upvits.deploy.store.disk import is_disk_full, unwritable_error
from upvits.deploy.store.drafts import held

_ASIDE = "-old"
# Of Linux, from fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to be filled and put in place; it is gone when the context ends.

    What killed processes left of theirs is removed first. A process holds its draft by a lock, which ends with it.

    Raises:
        UserError: no folder can be made there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(out)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.work-", dir=out.parent))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise unwritable_error(out, error) from error
    with held(draft):
        try:
            share(draft)
            yield draft
        finally:
            _remove(draft)


def _remove_left_over(out: Path) -> None:
    for left in out.parent.glob(f".{glob.escape(out.name)}.work-*"):
        with held(left) as free:
            if free and left.name.endswith(_ASIDE) and not out.exists():
                left.rename(out)  # killed between two renames
            elif free:
                shutil.rmtree(left, ignore_errors=True)


def put_in_place(draft: Path, out: Path) -> None:
    """Bring a draft to its place. The folder that it replaces is there until then, under every kind of kill."""
    if not out.exists():
        draft.rename(out)
    elif not _exchanged(draft, out):
        aside = draft.with_name(f"{draft.name}{_ASIDE}")
        out.rename(aside)
        try:
            draft.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        _remove(aside)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    names = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return bool(renameat2(*names, _RENAME_EXCHANGE) == 0)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link that stood for one."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
