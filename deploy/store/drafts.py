"""What a process writes before it is whole: held by a lock while the process lives, and removed by a later one when it
was killed. Only names of the exact shape that is made here are touched, and no links.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_RANDOM = "[a-z0-9_]" * 8
"""What `tempfile` puts into names."""

_SCRATCH = "upvits-work-"


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Keep other processes from removing a file or folder; False where another holds it, or the system has no locks."""
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (ImportError, OSError):
        yield False
        return
    holds = False
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holds = True
    try:
        yield holds
    finally:
        os.close(descriptor)


def new_draft(path: Path) -> tuple[int, Path]:
    """A new file beside `path` to be renamed to it, as open descriptor and path; drafts of killed processes go."""
    remove_drafts(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    return descriptor, Path(name)


def drafts_of(path: Path) -> list[Path]:
    """Files beside `path` that are, or were, to be renamed to it."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{_RANDOM}.tmp"))


def remove_drafts(path: Path) -> None:
    """Remove what killed processes left beside `path` of files that were to be renamed to it."""
    for left in drafts_of(path):
        with held(left) as free, suppress(OSError):
            if free and stat.S_ISREG(left.lstat().st_mode):
                left.unlink()


def remove_work_folders(run_dir: Path) -> None:
    """Remove what killed processes left of stages of the main job, once all of them are whole in a run that is held.

    What is left then is of other settings. Detectors have commands of their own, which continue theirs.
    """
    for pattern in (".[0-6]-*", "[0-6]-*/.*"):
        for left in run_dir.glob(pattern):
            ours = re.fullmatch(r"\..+\.(work-[0-9a-f]{16}|shared)", left.name)
            if ours and left.is_dir() and not left.is_symlink() and not left.parent.is_symlink():
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files, gone when the context ends; those of killed processes go."""
    for left in Path(tempfile.gettempdir()).glob(_SCRATCH + _RANDOM):
        with held(left) as free, suppress(OSError):
            if free and left.is_dir() and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        with held(folder):
            if not folder.exists():  # another process took it for one that was left
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return
