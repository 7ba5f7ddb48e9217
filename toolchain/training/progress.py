"""What people see of a training: one line on a terminal, or a line in the log now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from upvits.calib_data.progress import progress_bar

_LOGGER = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_LOOKS = 2.0  # reading a loss waits for the GPU


class TrainingProgress:
    """Loss, speed and time left of a whole training, for the process that shows them.

    Attributes:
        due: whether the loss is to be shown now; asked after every step.
    """

    def __init__(self, bar: Progress, task: TaskID, epochs: int, steps_per_epoch: int, done: int, batch: int) -> None:
        self._bar, self._task = bar, task
        self._epochs, self._steps, self._first, self._batch = epochs, steps_per_epoch, done, batch
        self._started = self._looked = self._said = time.monotonic()
        self._top1 = ""

    @property
    def due(self) -> bool:
        return time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS

    def step(self, epoch: int, step: int, loss: float) -> None:
        """After a step of an epoch (both counted from 1), with the mean loss of the epoch so far."""
        self._looked = time.monotonic()
        text = self._text(epoch, (epoch - 1) * self._steps + step, loss)
        self._bar.update(self._task, completed=(epoch - 1) * self._steps + step, text=text)
        if self._bar.disable and self._looked - self._said >= _SECONDS_BETWEEN_LINES:
            self._say(f"{text}, step {step} of {self._steps}")

    def epoch(self, epoch: int, loss: float, accuracy: float | None) -> None:
        """After an epoch, with its accuracy in percent where it was evaluated."""
        self._top1 = "" if accuracy is None else f", top-1 {accuracy:.1f} %"
        text = self._text(epoch, epoch * self._steps, loss)
        self._bar.update(self._task, completed=epoch * self._steps, text=text)
        if self._bar.disable:
            self._say(text)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        _LOGGER.info("%s", text)

    def _text(self, epoch: int, done: int, loss: float) -> str:
        seconds, steps = time.monotonic() - self._started, done - self._first
        left = timedelta(seconds=round(seconds / max(steps, 1) * (self._epochs * self._steps - done)))
        speed = steps * self._batch / max(seconds, 1e-9)
        return f"epoch {epoch}/{self._epochs}: loss {loss:.3f}{self._top1}, {speed:.0f} images/s, {left} left"


@contextmanager
def training_progress(
    epochs: int, steps_per_epoch: int, done: int, batch: int, *, quiet: bool
) -> Iterator[TrainingProgress | None]:
    """None when quiet.

    Args:
        epochs: of the whole training.
        steps_per_epoch: steps of one.
        done: steps that were done before.
        batch: images of a step, over all processes.
        quiet: nothing is shown.
    """
    if quiet:
        yield None
        return
    with progress_bar(quiet=False, columns=(BarColumn(bar_width=12), TextColumn("{task.fields[text]}"))) as bar:
        task = bar.add_task("training", total=epochs * steps_per_epoch, completed=done, text="training")
        yield TrainingProgress(bar, task, epochs, steps_per_epoch, done, batch)
