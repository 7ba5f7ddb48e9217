"""Whether the other processes are alive: every one of them keeps a connection to the first, which breaks when it ends.

torch's collectives would wait for a dead process until they time out, and a process that waits inside one runs no
Python. So a thread of its own listens on each connection. When one breaks, the first process says so, sends the others
home, and ends; of the others, the second speaks where it was the first process that died.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from upvits.calib_data.errors import LostProcessError, UserError

Speak = Callable[[Exception], int]
"""Says what went wrong, and returns the exit code."""

_GOODBYE, _LEAVE, _FAILED = range(3)
_BETWEEN = "\0"  # parts of an error
_ALIKE_SECONDS = 20.0  # for the first process to fail in the same way as another one, and perhaps to go on from there
_GOODBYE_SECONDS = 20.0
_VERDICT_SECONDS = 5.0  # from a collective that fails until it is known who died


def speak_plainly(error: Exception) -> int:
    """Print an error without colours; returns its exit code."""
    print(f"Error: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, UserError) else 1


@dataclass(frozen=True, slots=True)
class _Note:
    kind: int
    order: int = 0
    text: str = ""


class Watch:
    """Connections between the first process and the others, and a thread that listens on each.

    Attributes:
        order: number of the order that is carried out, or was the last one.
        failed: number of the last order that failed in this process.
    """

    def __init__(self, group: Any, rank: int, size: int, speak: Speak) -> None:
        self.order = self.failed = 0
        self._group, self._rank, self._speak = group, rank, speak
        self._others = range(1, size) if rank == 0 else range(1)
        self._ending, self._parting = threading.Lock(), False
        self._threads = [threading.Thread(target=self._listen, args=(other,), daemon=True) for other in self._others]
        for thread in self._threads:
            thread.start()

    def part(self) -> None:
        """Say goodbye to the others and wait for theirs: a connection that breaks now is no accident."""
        self._parting = True
        for other in self._others:
            with suppress(RuntimeError):  # it is gone
                self._send(other, _Note(_GOODBYE))
        for thread in self._threads:
            thread.join(_GOODBYE_SECONDS)

    def send_home(self, code: int) -> None:
        """Let all others end at once, whatever they are waiting for, without a word."""
        self._parting = True
        for other in self._others:
            with suppress(RuntimeError):
                self._send(other, _Note(_LEAVE, order=code))

    def report(self, error: Exception) -> None:
        """Tell the first process that this one failed; it decides whether that ends the job."""
        if not isinstance(error, UserError):
            self.wait_for_verdict()
        self._send(0, _Note(_FAILED, self.order, _packed(error)))

    def wait_for_verdict(self) -> None:
        """After an error that a dead process may have caused: returns where none has died."""
        time.sleep(_VERDICT_SECONDS)

    def _listen(self, other: int) -> None:
        while True:
            try:
                note = self._receive(other)
            except (RuntimeError, ValueError):  # the latter: the group was left meanwhile
                if self._parting:
                    return
                self._end(LostProcessError(
                    f"Process {other} of {self._size} ended before the work was done.",
                    why="It was killed, ran out of memory, or lost its connection; all others end, too.",
                    fix="The same command continues.",
                ))  # fmt: skip
                return
            if note.kind == _GOODBYE:
                return
            if note.kind == _LEAVE:
                os._exit(note.order)
            self._judge(other, note)

    @property
    def _size(self) -> int:
        return int(dist.get_world_size(self._group))

    def _judge(self, other: int, note: _Note) -> None:
        """End the job, unless this process failed in the same order: it then knows of the error, too."""
        deadline = time.monotonic() + _ALIKE_SECONDS
        while self.failed < note.order and self.order == note.order and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.failed < note.order:
            self._end(_unpacked(other, note.text))

    def _end(self, error: Exception) -> None:
        """One message, and the end of this process and those that still listen to it."""
        if not self._ending.acquire(blocking=False):  # another thread speaks already
            return
        code = LostProcessError.exit_code
        try:
            if self._rank < 2:  # the second speaks where the first one died
                code = self._speak(error)
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
            if self._rank == 0:
                self.send_home(code)
        finally:
            os._exit(code)

    def _send(self, other: int, note: _Note) -> None:
        text = torch.frombuffer(bytearray(note.text.encode() or b" "), dtype=torch.uint8)
        dist.send(torch.tensor([note.kind, note.order, len(text)]), dst=other, group=self._group)
        dist.send(text, dst=other, group=self._group)

    def _receive(self, other: int) -> _Note:
        head = torch.zeros(3, dtype=torch.int64)
        dist.recv(head, src=other, group=self._group)
        kind, order, length = head.tolist()
        text = torch.zeros(length, dtype=torch.uint8)
        dist.recv(text, src=other, group=self._group)
        return _Note(kind, order, bytes(text.numpy()).decode())


def _packed(error: Exception) -> str:
    """An error as text: what, why, what to do, exit code; of an unexpected one type and traceback, and no code."""
    if isinstance(error, UserError):
        return _BETWEEN.join((error.what, error.why, error.fix, str(error.exit_code)))
    trace = "".join(traceback.format_exception(error))
    return _BETWEEN.join((f"{type(error).__name__}: {error}", trace, "", ""))


def _unpacked(other: int, text: str) -> Exception:
    """The error of another process, as this one can say it."""
    what, why, fix, code = text.split(_BETWEEN)
    if not code:
        unexpected = RuntimeError(f"process {other}: {what}")
        unexpected.__cause__ = RuntimeError(why)
        return unexpected
    error = UserError(f"Process {other}: {what}", why=why, fix=fix)
    error.exit_code = int(code)
    return error
