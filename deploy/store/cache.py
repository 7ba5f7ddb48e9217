"""The folder of what is kept from run to run: latency tables, and annotations in a form of our own."""

from __future__ import annotations

import os
from pathlib import Path

from upvits.calib_data.errors import UserError


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
