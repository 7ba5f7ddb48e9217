"""Latency of several sessions, measured in turns in one process.

Clocks, temperature and other jobs drift. Measured one after the other, the drift ends up in the ratio; measured in
turns (A B, B A, ...), it hits all sessions alike, and the ratio is taken within each round.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.progress import Progress

from calib_data.errors import UserError
from deploy.runtimes.interface import Arrays, Session

UNSTABLE_CV = 0.025


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Wall time of one call, in milliseconds, inputs and outputs on the host.

    Attributes:
        cv: standard deviation over mean.
        images_per_second: batch over median.
        unstable: `cv` above 2.5 %: the spread is too large for fine comparisons.
    """

    batch: int
    iterations: int
    min: float
    median: float
    mean: float
    p90: float
    p99: float
    cv: float
    images_per_second: float
    unstable: bool


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster a session is than the reference: the median over rounds of the ratio of their medians.

    `low` and `high` are the 10th and 90th percentile over rounds.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """How to measure, per batch size: all sessions together take about `seconds`, warm-up apart.

    Every session gets at least `min_iterations` timed calls, however long they take.
    """

    seconds: float = 10.0
    warmup: int = 5
    rounds: int = 10
    min_iterations: int = 30
    max_iterations: int = 2000

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.warmup < 1 or self.min_iterations < 1 or not self.seconds > 0:
            raise UserError(
                "the measurement is too short",
                why=f"rounds {self.rounds}, warm-up {self.warmup}, iterations {self.min_iterations}, {self.seconds} s.",
                fix="Use at least 2 rounds, 1 warm-up call, 1 iteration and some seconds.",
            )


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """What was measured.

    Attributes:
        reference: name of the session that speed-ups refer to.
        stats: by session name and batch size.
        speedup: by session name (the reference left out) and batch size.
        sessions: what every session ran on, by name.
        seconds: wall time of the timed calls of all sessions and batch sizes.
    """

    reference: str
    stats: dict[str, dict[int, LatencyStats]]
    speedup: dict[str, dict[int, Speedup]]
    sessions: dict[str, dict[str, str | int | bool]]
    settings: BenchSettings
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values, batch sizes as keys "b1", "b8"."""
        result = asdict(self)
        for table in ("stats", "speedup"):
            result[table] = {
                name: {f"b{batch}": value for batch, value in by_batch.items()}
                for name, by_batch in result[table].items()
            }
        return result


def interleave(
    sessions: Mapping[str, Session],
    feeds: Mapping[int, Arrays],
    settings: BenchSettings | None = None,
    *,
    quiet: bool = True,
) -> LatencyReport:
    """Measure sessions in turns.

    Args:
        sessions: by name; the first is the reference, usually the dense model.
        feeds: inputs by batch size, the same for all sessions.
        settings: how long and how often; default `BenchSettings()`.
        quiet: no progress bar.

    Raises:
        UserError: there is no session or no batch to measure.
    """
    if not sessions or not feeds:
        raise UserError("nothing to measure", why=f"{len(sessions)} sessions and {len(feeds)} batch sizes were given.")
    settings = settings or BenchSettings()
    reference = next(iter(sessions))
    report = LatencyReport(
        reference=reference,
        stats={name: {} for name in sessions},
        speedup={name: {} for name in sessions if name != reference},
        sessions={name: dict(session.settings) for name, session in sessions.items()},
        settings=settings,
        seconds=0.0,
    )
    seconds = 0.0
    with Progress(disable=quiet, transient=True) as progress:
        task = progress.add_task("latency", total=len(feeds) * settings.rounds)
        for batch, feed in feeds.items():
            calls = _calls_per_round(sessions, feed, settings)
            rounds: dict[str, list[list[float]]] = {name: [] for name in sessions}
            for number in range(settings.rounds):
                # Every other round runs backwards, so that nobody always follows the same neighbour.
                for name in list(sessions)[:: 1 if number % 2 == 0 else -1]:
                    rounds[name].append(_time_calls(sessions[name], feed, calls))
                progress.advance(task)
            seconds += sum(sum(sum(times) for times in own) for own in rounds.values())
            medians = {name: np.array([np.median(times) for times in own]) for name, own in rounds.items()}
            for name, own in rounds.items():
                report.stats[name][batch] = latency_stats(np.concatenate(own), batch)
                if name != reference:
                    report.speedup[name][batch] = _speedup(medians[reference] / medians[name])
    return LatencyReport(report.reference, report.stats, report.speedup, report.sessions, settings, seconds)


def latency_stats(seconds: np.ndarray[Any, np.dtype[Any]], batch: int) -> LatencyStats:
    """Statistics of call times [N] in seconds."""
    ms = np.asarray(seconds, np.float64) * 1e3
    mean, median = float(ms.mean()), float(np.median(ms))
    cv = float(ms.std() / mean)
    return LatencyStats(
        batch=batch,
        iterations=len(ms),
        min=float(ms.min()),
        median=median,
        mean=mean,
        p90=float(np.percentile(ms, 90)),
        p99=float(np.percentile(ms, 99)),
        cv=cv,
        images_per_second=batch * 1e3 / median,
        unstable=cv > UNSTABLE_CV,
    )


def _calls_per_round(sessions: Mapping[str, Session], feed: Arrays, settings: BenchSettings) -> int:
    """Warm all sessions up, and share the time budget out by what a call takes after that."""
    one_of_each = 0.0
    for session in sessions.values():
        _time_calls(session, feed, settings.warmup)
        one_of_each += float(np.median(_time_calls(session, feed, 3)))
    fitting = settings.seconds / max(one_of_each, 1e-9)
    wanted = min(max(fitting, settings.min_iterations), max(settings.max_iterations, settings.min_iterations))
    return math.ceil(wanted / settings.rounds)


def _time_calls(session: Session, feed: Arrays, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        session.run(feed)
        times.append(time.perf_counter() - started)
    return times


def _speedup(ratios: np.ndarray[Any, np.dtype[Any]]) -> Speedup:
    return Speedup(
        median=float(np.median(ratios)),
        low=float(np.percentile(ratios, 10)),
        high=float(np.percentile(ratios, 90)),
    )
