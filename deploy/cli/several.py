"""A command in one of several processes: the first one runs it, the others join in and say nothing."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable

from upvits.calib_data.errors import UserError

Command = Callable[[], object]


def is_first() -> bool:
    """Whether this is the process that leads."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def lead(command: Command, speak: Callable[[Exception], int]) -> None:
    """Run a command as the first process; the others are there for what is worth sharing.

    Args:
        command: of the command line.
        speak: says an error of another process, and returns the exit code.
    """
    from upvits.toolchain.processes.crew import gathered  # torch, which --help does without

    with gathered(speak):
        command()


def follow(speak: Callable[[Exception], int]) -> int:
    """Join in until the first process has ended, or torchrun or slurm ends this one; returns the exit code."""
    from upvits.toolchain.processes.crew import gathered

    logging.getLogger("upvits").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        with gathered(speak) as crew:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the first process gets them, too, and
                signal.signal(number, signal.SIG_IGN)  # when it ends this one ends with it
            crew.follow()
    except UserError as error:  # the first process has the same, and says it
        return error.exit_code
    return 0
