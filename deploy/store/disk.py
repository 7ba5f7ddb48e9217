"""What a disk refuses, as messages: no space left, no right to write, a folder in place of a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upvits.calib_data.errors import UserError

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextmanager
def disk_errors(run_dir: Path, name: str) -> Iterator[None]:
    """Turn a full disk, and places that cannot be written, into messages; leave every other error alone."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_full_error(run_dir, f"stage {name} could not finish") from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and _is_below(run_dir, error.filename):
            raise unwritable_error(run_dir, error) from error
        if isinstance(error, IsADirectoryError) and _is_below(run_dir, error.filename):
            raise folder_in_the_way(error) from error
        raise


def _is_below(run_dir: Path, filename: object) -> bool:
    return isinstance(filename, (str, bytes)) and Path(os.fsdecode(filename)).is_relative_to(run_dir)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is "no space left": native libraries wrap it in other types."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def disk_full_error(run_dir: Path, what: str) -> UserError:
    """The message for a full disk below `run_dir`."""
    return UserError(
        f"no space left on the disk of {run_dir}: {what}.",
        why="Only whole artifacts are kept; the unfinished one was not put in place.",
        fix="Free some space or choose another folder with --output, then run the same command: it continues.",
    )


def folder_in_the_way(error: IsADirectoryError) -> UserError:
    """The message for a folder that has the name of a file that is to be written."""
    return UserError(
        f"cannot write {error.filename2 or error.filename}: it is a folder.",
        why="A file of this name is written there.",
        fix="Move the folder away or delete it, then run the same command: it continues.",
    )


def unwritable_error(run_dir: Path, error: OSError) -> UserError:
    """The message for a run directory that cannot be written."""
    return UserError(
        f"cannot write to the output folder {run_dir}: {error.strerror or error}.",
        why="Results are written below this folder.",
        fix="Choose a folder that you may write to with --output.",
    )
