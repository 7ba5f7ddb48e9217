"""What the library says through `logging`, on stderr. Only the command line installs this; a library user decides."""

from __future__ import annotations

import logging
import os

from upvits.calib_data.errors import UserError
from upvits.deploy.cli.console import console

LEVEL = "UPVITS_LOG"
"""The environment variable that names the level: debug, info, warning or error."""

_LOGGER = logging.getLogger("upvits")
_STYLES = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "red"}


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text, style = self.format(record), _STYLES.get(record.levelno)
        console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def show_log() -> None:
    """Print what is logged from now on, from the level that the environment names (info).

    Raises:
        UserError: there is no such level.
    """
    if not any(isinstance(handler, _Stderr) for handler in _LOGGER.handlers):
        _LOGGER.addHandler(_Stderr())
    level = os.environ.get(LEVEL) or "info"
    try:
        _LOGGER.setLevel(level.upper())
    except ValueError as error:
        raise UserError(f"{LEVEL}={level} is no level.", fix="Use debug, info, warning or error.") from error


def be_quiet(quiet: bool) -> bool:
    """Errors only, where `--quiet` was given."""
    if quiet:
        _LOGGER.setLevel(logging.ERROR)
    return quiet


def be_verbose(verbose: bool) -> bool:
    """Everything, where `--verbose` was given."""
    if verbose:
        _LOGGER.setLevel(logging.DEBUG)
    return verbose
