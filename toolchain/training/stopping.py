"""When a training writes a checkpoint within an epoch, and when it stops: after SIGTERM, or after SIGUSR1, which slurm
can send before the time is over."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from upvits.calib_data.errors import StoppedError
from upvits.toolchain.processes.process import shared

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_STEPS_BETWEEN_LOOKS = 10  # of several processes, which ask the first one


@contextmanager
def requests_to_stop(*, listen: bool) -> Iterator[list[int]]:
    """The signals that came so far, in a list; they have no other effect meanwhile.

    Args:
        listen: False leaves the signals alone, and so does a thread: handlers belong to the main one.
    """
    came: list[int] = []
    if not listen or threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in _SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_due(step: int, saved: float, minutes: float, signals: list[int]) -> bool:
    """Whether a checkpoint is to be written; all processes get the same answer.

    Args:
        step: of the epoch.
        saved: when the last one was written, of `time.perf_counter`.
        minutes: between two.
        signals: that came.
    """
    if shared().world_size > 1 and minutes > 0 and step % _STEPS_BETWEEN_LOOKS:
        return False
    return shared().from_leader(lambda: bool(signals) or time.perf_counter() - saved >= 60 * minutes)


def stop_if_asked(signals: list[int], where: str) -> None:
    """End the training of all processes where the first one got a signal.

    Raises:
        StoppedError: names it.
    """
    number = shared().from_leader(lambda: next(iter(signals), None))
    if number is not None:
        raise StoppedError(
            f"Training was stopped by {signal.Signals(number).name} {where}; a checkpoint is written.",
            fix="The same command continues.",
        )
