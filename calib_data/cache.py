"""The folder of what is kept from run to run: latency tables, annotations in a form of our own, what was found out
about images. All of it can be made again.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from upvits.calib_data.errors import UserError

_LOGGER = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`UPVITS_DEPLOY_CACHE`, or `upvits-deploy` in the user's cache folder.

    Raises:
        UserError: neither is known: a user without a home folder, as in some containers.
    """
    if named := os.environ.get("UPVITS_DEPLOY_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upvits-deploy"
    except RuntimeError as error:
        raise UserError(
            "This user has no home folder.",
            why="What is kept from run to run needs a place.",
            fix="Name one in the variable UPVITS_DEPLOY_CACHE.",
        ) from error


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache whole, or not at all: another process may do the same, or the disk be full."""
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent, delete=False) as file:
            draft = file.name
            file.write(content)
        os.replace(draft, path)
    except OSError as error:
        _LOGGER.debug("Nothing is kept in %s: %s", path, error)
        if draft is not None:
            with suppress(OSError):
                os.unlink(draft)
