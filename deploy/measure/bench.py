"""Latency of several sessions, measured in turns in one process, as trtexec measures one.

Clocks, temperature and other jobs drift. Measured one after the other, the drift ends up in the ratio; measured in
turns (A B C, C B A, ...), it hits all sessions alike, and the ratio of any two is taken within each round.

Sessions on GPUs take turns among themselves, and those on CPUs after them: the clocks of a GPU fall while it waits for
a CPU session, and rise again only while it works.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import progress_bar
from upvits.deploy.choices import MAX_STREAMS
from upvits.deploy.machine.gpu_monitor import GpuMonitor
from upvits.deploy.runtimes.interface import Arrays, CallTimes, Floats, Session

UNSTABLE_CV = 0.025
LAUNCH_BOUND = 0.8
"""Submitting the work limits a call from this share of the compute time on; trtexec warns at the same share."""

_PARTS = ("h2d", "compute", "d2h", "enqueue")
_WARMUP_CHUNK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Wall time of one call, in milliseconds, inputs and outputs on the host.

    Attributes:
        cv: standard deviation over mean of all calls, as trtexec reports it (of the compute time alone). Not
            robust on purpose: an application would see a few slow calls, too.
        drift: spread of the medians of rounds (1.4826 times their median absolute deviation, over their median). A
            large `cv` with a small `drift` is jitter of single calls and leaves medians and ratios alone; a large
            `drift` means that clocks or other jobs changed meanwhile.
        quantiles: the 0th to 100th percentile in steps of 2 (51 values).
        images_per_second: batch over median.
        unstable: `cv` above 2.5 %: the spread is too large for fine comparisons.
        h2d, compute, d2h, enqueue: medians of the parts of a call; None on the CPU.
    """

    batch: int
    iterations: int
    min: float
    median: float
    mean: float
    p90: float
    p95: float
    p99: float
    cv: float
    drift: float
    quantiles: tuple[float, ...]
    images_per_second: float
    unstable: bool
    h2d: float | None = None
    compute: float | None = None
    d2h: float | None = None
    enqueue: float | None = None


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
    """How to measure, per batch size: all sessions together take about `seconds`, an equal share each, warm-up apart.

    A session is warmed up for `warmup` calls and `warmup_seconds`, whichever takes longer; on a GPU also for
    `turn_seconds` before each of its turns. It gets at least `min_iterations` timed calls, however long they take, and
    at most `max_iterations`.
    """

    seconds: float = 10.0
    warmup: int = 5
    warmup_seconds: float = 0.2
    rounds: int = 10
    min_iterations: int = 30
    max_iterations: int = 2000
    turn_seconds: float = 0.1

    def __post_init__(self) -> None:
        enough = self.rounds >= 2 and self.warmup >= 1 and self.min_iterations >= 1
        if not (
            enough
            and self.seconds > 0
            and math.isfinite(self.seconds)
            and min(self.warmup_seconds, self.turn_seconds) >= 0
        ):
            raise UserError(
                "the measurement is too short or has no end",
                why=f"rounds {self.rounds}, warm-up {self.warmup}, iterations {self.min_iterations}, {self.seconds} s.",
                fix="Use at least 2 rounds, 1 warm-up call, 1 iteration and some seconds.",
            )


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """What was measured.

    Attributes:
        stats: by session name and batch size.
        rounds: median of every round in milliseconds, by session name and batch size. The sessions of a kind of device
            took turns within each round, so element i of a session is compared with element i of another session.
        sessions: what every session ran on, by name.
        seconds: wall time of the timed calls of all sessions and batch sizes.
    """

    stats: dict[str, dict[int, LatencyStats]]
    rounds: dict[str, dict[int, tuple[float, ...]]]
    sessions: dict[str, dict[str, str | int | bool]]
    settings: BenchSettings
    seconds: float

    def ratio(self, reference: str, name: str, batch: int) -> Speedup:
        """How many times faster session `name` is than session `reference`, compared within rounds.

        Raises:
            KeyError: a session was not measured at this batch size.
        """
        ratios = np.array(self.rounds[reference][batch]) / np.array(self.rounds[name][batch])
        low, median, high = np.percentile(ratios, (10, 50, 90)).tolist()
        return Speedup(median=median, low=low, high=high)

    def warnings(self) -> list[str]:
        """What makes figures doubtful or points at the host instead of the model, a sentence each."""
        return [
            f"{name}, batch {batch}: {warning}"
            for name, by_batch in self.stats.items()
            for batch, stats in by_batch.items()
            for warning in _warnings(stats)
        ]


def interleave(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Mapping[int, Arrays]],
    settings: BenchSettings | None = None,
    *,
    quiet: bool = True,
) -> LatencyReport:
    """Measure sessions in turns, each at the batch sizes that it has inputs for.

    Args:
        sessions: by name.
        feeds: inputs by session name and batch size.
        settings: how long and how often; default `BenchSettings()`.
        quiet: no progress bar.

    Raises:
        UserError: no session or no batch size was given.
    """
    batches = list(dict.fromkeys(batch for inputs in feeds.values() for batch in inputs))
    if not batches:
        raise UserError(
            "nothing to measure", why=f"{len(sessions)} sessions and {len(batches)} batch sizes were given."
        )
    settings = settings or BenchSettings()
    stats: dict[str, dict[int, LatencyStats]] = {name: {} for name in sessions}
    medians: dict[str, dict[int, tuple[float, ...]]] = {name: {} for name in sessions}
    seconds = 0.0
    with progress_bar(quiet=quiet) as progress:
        task = progress.add_task("latency", total=len(batches) * settings.rounds)
        for batch in batches:
            taking = {name: (sessions[name], inputs[batch]) for name, inputs in feeds.items() if batch in inputs}
            measured = _measure(taking, settings, lambda part: progress.advance(task, part))
            for name, rounds in measured.items():
                stats[name][batch] = latency_stats(rounds, batch)
                medians[name][batch] = tuple(float(np.median(times.total)) * 1e3 for times in rounds)
                seconds += sum(float(times.total.sum()) for times in rounds)
    settings_used = {name: dict(session.settings) for name, session in sessions.items()}
    return LatencyReport(stats, medians, settings_used, settings, seconds)


def latency_stats(rounds: Sequence[CallTimes], batch: int) -> LatencyStats:
    """Statistics of calls that were timed in one or more rounds."""
    ms = np.concatenate([np.asarray(times.total, np.float64) for times in rounds]) * 1e3
    quantiles = np.percentile(ms, np.arange(0, 101, 2)).tolist()
    p90, p95, p99 = np.percentile(ms, (90, 95, 99)).tolist()
    mean, median = float(ms.mean()), float(np.median(ms))
    medians = np.array([np.median(times.total) for times in rounds]) * 1e3
    cv = float(ms.std() / mean)
    return LatencyStats(
        batch=batch,
        iterations=len(ms),
        min=float(ms.min()),
        median=median,
        mean=mean,
        p90=p90,
        p95=p95,
        p99=p99,
        cv=cv,
        drift=float(1.4826 * np.median(np.abs(medians - np.median(medians))) / np.median(medians)),
        quantiles=tuple(quantiles),
        images_per_second=batch * 1e3 / median,
        unstable=cv > UNSTABLE_CV,
        **{part: _median_of_part(rounds, part) for part in _PARTS},
    )


def throughput(open_session: Callable[[], Session], feeds: Arrays, streams: int, seconds: float) -> float:
    """Images per second of several sessions that run at the same time, each in a separate thread.

    Args:
        open_session: opens a session; called `streams` times. Give CPU sessions few threads each.
        feeds: inputs of one call; the first axis is the batch.
        streams: sessions.
        seconds: how long all of them run, warm-up apart.

    Raises:
        UserError: `streams` is below 1 or too large, or `seconds` is not positive.
    """
    if not 1 <= streams <= MAX_STREAMS or not seconds > 0:
        raise UserError(
            f"{streams} streams for {seconds} s cannot be measured",
            fix=f"Use 1 to {MAX_STREAMS} streams and some time.",
        )
    sessions: list[Session] = []
    try:
        for _ in range(streams):
            sessions.append(open_session())
        # one after the other: runtimes may not record CUDA graphs while other threads use the device
        chunks = [
            max(1, int(_WARMUP_CHUNK_SECONDS / _warm_up(session, feeds, BenchSettings()))) for session in sessions
        ]
        barrier = threading.Barrier(streams)

        def stream(session: Session, chunk: int) -> float:
            barrier.wait()
            started, calls = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - started) < seconds:
                session.time(feeds, chunk)
                calls += chunk
            elapsed = time.perf_counter() - started
            return calls / elapsed

        with ThreadPoolExecutor(streams) as pool:
            return batch_of(feeds) * sum(pool.map(stream, sessions, chunks))
    finally:
        for session in sessions:
            session.close()


def joules_per_image(session: Session, feeds: Arrays, seconds: float = 2.0) -> float | None:
    """Energy of the GPU per image while a session runs without a break, idle power included; None without a GPU.

    The driver's energy counter moves in steps of some tens of milliseconds, so single calls cannot be told apart.
    """
    chunk = max(1, int(_WARMUP_CHUNK_SECONDS / _warm_up(session, feeds, BenchSettings())))
    calls = 0
    with GpuMonitor() as monitor:
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            session.time(feeds, chunk)
            calls += chunk
    energy = monitor.joules
    return None if energy is None else energy / (calls * batch_of(feeds))


def batch_of(feeds: Arrays) -> int:
    """Size of the first axis of the first input that has one."""
    return next((len(array) for array in feeds.values() if array.ndim), 1)


def _measure(
    participants: Mapping[str, tuple[Session, Arrays]], settings: BenchSettings, advance: Callable[[float], None]
) -> dict[str, list[CallTimes]]:
    """Call times of every session in every round, at one batch size."""
    share = settings.seconds / len(participants)
    rounds: dict[str, list[CallTimes]] = {name: [] for name in participants}
    of_devices = [
        {name: work for name, work in participants.items() if work[0].on_gpu == on_gpu} for on_gpu in (True, False)
    ]
    alike = [group for group in of_devices if group]
    for group in alike:
        calls = {name: _calls_per_round(_warm_up(*work, settings), share, settings) for name, work in group.items()}
        for number in range(settings.rounds):
            # Every other round runs backwards, so that no session always follows the same other one.
            for name in list(group)[:: 1 if number % 2 == 0 else -1]:
                session, feed = group[name]
                _warm_turn(session, feed, settings)
                rounds[name].append(session.time(feed, calls[name]))
            advance(1 / len(alike))
    return rounds


def _warm_turn(session: Session, feeds: Arrays, settings: BenchSettings) -> None:
    """Begin a turn: the session before has filled the caches with its weights, and a GPU may have rested."""
    started = time.perf_counter()
    took = max(float(session.time(feeds, 1).total[0]), 1e-4)
    while session.on_gpu and (left := settings.turn_seconds - (time.perf_counter() - started)) > 0:
        session.time(feeds, max(1, int(min(left, _WARMUP_CHUNK_SECONDS) / took)))


def _warm_up(session: Session, feeds: Arrays, settings: BenchSettings) -> float:
    """Run a session until it is warm; returns what a call takes then, in seconds."""
    started = time.perf_counter()
    times = session.time(feeds, settings.warmup).total
    while time.perf_counter() - started < settings.warmup_seconds:
        times = session.time(feeds, max(1, int(_WARMUP_CHUNK_SECONDS / max(float(np.median(times)), 1e-4)))).total
    return max(float(np.median(times)), 1e-9)


def _calls_per_round(seconds_per_call: float, share: float, settings: BenchSettings) -> int:
    most = max(settings.max_iterations, settings.min_iterations)
    return math.ceil(min(max(share / seconds_per_call, settings.min_iterations), most) / settings.rounds)


def _median_of_part(rounds: Sequence[CallTimes], part: str) -> float | None:
    parts: list[Floats] = [times for calls in rounds if (times := getattr(calls, part)) is not None]
    return float(np.median(np.concatenate(parts))) * 1e3 if parts else None


def _warnings(stats: LatencyStats) -> list[str]:
    warnings = []
    if stats.compute is not None:
        if stats.enqueue is not None and stats.enqueue > LAUNCH_BOUND * stats.compute:
            warnings.append(
                f"launch-bound: submitting the work takes {stats.enqueue:.3f} ms, the GPU {stats.compute:.3f} ms; "
                "a CUDA graph or a larger batch helps"
            )
        copies = [("input to the GPU", stats.h2d), ("output back", stats.d2h)]
        warnings += [
            f"copying the {what} takes {ms:.3f} ms, longer than computing ({stats.compute:.3f} ms)"
            for what, ms in copies
            if ms is not None and ms > stats.compute
        ]
    if stats.unstable:
        cause = "clocks or other jobs changed meanwhile" if stats.drift > UNSTABLE_CV else "single calls jitter"
        warnings.append(f"unstable: CV {100 * stats.cv:.1f} %, between rounds {100 * stats.drift:.1f} %; {cause}")
    return warnings
