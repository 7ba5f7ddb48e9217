"""When several processes look for signals and for the time of a checkpoint: all after the same steps, and in time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from upvits.toolchain.training import stopping
from upvits.toolchain.training.stopping import Checkpoints


class FirstOfTwo:
    """Stands for the first of two processes; asking it costs a message to the other one, which is counted."""

    world_size = 2

    def __init__(self) -> None:
        self.asked = 0

    def from_leader(self, make: Callable[[], Any]) -> Any:
        self.asked += 1
        return make()


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.7, 5.0])
def test_a_signal_is_seen_within_seconds_however_long_a_step_takes(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, process = [0.0], FirstOfTwo()
    monkeypatch.setattr(stopping, "shared", lambda: process)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    signals: list[int] = []
    checkpoints = Checkpoints(60.0, signals)
    for _ in range(150):
        now[0] += seconds
        assert not checkpoints.is_due()
    looks = process.asked
    assert looks <= 150 * seconds / stopping._LOOK_SECONDS * 2 + 12  # seldom where steps are quick
    signals.append(15)
    came = now[0]
    for _ in itertools.count():
        now[0] += seconds
        if checkpoints.is_due():
            break
    assert now[0] - came <= max(stopping._LOOK_SECONDS, seconds) + seconds
    assert now[0] - came < 15


def test_minutes_are_kept_and_counted_from_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    checkpoints, written = Checkpoints(1.0, []), []
    for _ in range(400):
        now[0] += 1.0
        if checkpoints.is_due():
            written.append(now[0])
            checkpoints.written()
    assert written == [60.0, 120.0, 180.0, 240.0, 300.0, 360.0]


def test_without_minutes_every_step_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    process = FirstOfTwo()
    monkeypatch.setattr(stopping, "shared", lambda: process)
    checkpoints = Checkpoints(0.0, [])
    assert all(checkpoints.is_due() for _ in range(20))
