"""Files and places that people name: checked before they are opened, since a pipe waits for ever and a device never
ends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from upvits.calib_data.errors import UserError


def user_path(text: str | Path) -> Path:
    """The path that somebody named, `~` expanded; nothing need be there.

    Raises:
        UserError: it is empty, in the home of an unknown user, or no path on this system (too long a name, a circle
            of links, a null character).
    """
    if not str(text).strip():
        raise UserError("A path is empty.", fix="Name a file or a folder, or leave the option out.")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} is in the home of an unknown user.", fix="Give the whole path.") from error
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # whoever opens it says more
    except (OSError, ValueError) as error:
        raise unusable(path, error) from error
    return path


def require_regular(path: Path, *, fix: str) -> os.stat_result:
    """The status of a regular file.

    Args:
        path: of the file; links are followed.
        fix: what to do where there is none.

    Raises:
        UserError: it is absent, or a folder, a pipe, a device or a socket.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise unusable(path, error, fix) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file.", fix=fix)
    return status


def unusable(path: Path, error: OSError | ValueError, fix: str = "Give another path.") -> UserError:
    """The message for a path that the system refuses."""
    reason = error.strerror if isinstance(error, OSError) else str(error)  # ValueError: a null character in the name
    return UserError(f"{path} cannot be read.", why=f"The system says: {reason}.", fix=fix)
