"""When a training writes a checkpoint within an epoch, and when it stops: after SIGTERM, or after SIGUSR1, which slurm
can send before the time is over."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from upvits.calib_data.errors import StoppedError
from upvits.toolchain.processes.process import shared

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_SECONDS = 2.0
"""Between two looks of several processes, which ask the first one each time; torchrun kills 30 s after SIGTERM."""
_MOST_STEPS = 50  # between two looks, however quick the steps are


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


@dataclass(slots=True)
class Checkpoints:
    """Asked after every step of an epoch whether a checkpoint is to be written: all processes get the same answer.

    Attributes:
        minutes: between two.
        signals: that came.
        saved: when the last one was written, of `time.perf_counter`.
    """

    minutes: float
    signals: list[int]
    saved: float = field(default_factory=lambda: time.perf_counter())
    _looked: float = field(default_factory=lambda: time.perf_counter())
    _steps: int = 1  # from the last look to the next one
    _left: int = 1

    def is_due(self) -> bool:
        """After a step. A signal, or the end of the minutes, is seen within seconds, however long a step takes."""
        self._left -= 1
        if self._left > 0:
            return False
        due, self._steps = shared().from_leader(self._look)
        self._left = self._steps
        return due

    def _look(self) -> tuple[bool, int]:
        """Whether one is due, and after how many steps to look again."""
        now = time.perf_counter()
        due = bool(self.signals) or now - self.saved >= 60 * self.minutes
        step_seconds = max((now - self._looked) / self._steps, 1e-6)
        self._looked = now
        if shared().world_size == 1 or self.minutes == 0:
            return due, 1
        return due, max(1, min(int(_LOOK_SECONDS / step_seconds), 2 * self._steps, _MOST_STEPS))

    def written(self) -> None:
        self.saved = time.perf_counter()


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
