"""The folder of what is kept from run to run: latency tables, and annotations in a form of our own."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`UPVITS_DEPLOY_CACHE`, or `upvits-deploy` in the user's cache folder."""
    named = os.environ.get("UPVITS_DEPLOY_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upvits-deploy"
