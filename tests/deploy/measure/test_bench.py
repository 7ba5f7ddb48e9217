"""Bench: the figures are those of the call times, and drift hits everybody alike."""

import itertools
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from tests.deploy.conftest import Exported
from tests.deploy.machine.test_gpu_monitor import FakeNvml
from upvits.calib_data.errors import UserError
from upvits.deploy.measure.bench import (
    BenchSettings,
    LatencyReport,
    interleave,
    joules_per_image,
    latency_stats,
    throughput,
)
from upvits.deploy.runtimes import open_onnx
from upvits.deploy.runtimes.interface import Arrays, CallTimes, LayerTime, Session

QUICK = BenchSettings(seconds=0.05, warmup=1, warmup_seconds=0, rounds=4, min_iterations=30)


class Timed:
    """A session whose calls take as long as it is told, in a time of its own; it remembers when it was called."""

    input_names = ("images",)
    output_names = ("logits",)
    settings: Mapping[str, str | int | bool] = {"device": "clock"}
    on_gpu = False

    def __init__(
        self, name: str, seconds: float, calls: list[tuple[str, int, int]] | None = None, **parts: float
    ) -> None:
        self.name, self.seconds, self.calls, self.parts = name, seconds, [] if calls is None else calls, parts
        self.slower = 1.0

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        raise AssertionError("bench times sessions with `time`")

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        self.calls.append((self.name, len(feeds["images"]), calls))
        jitter = 1 + 0.01 * np.sin(np.arange(calls))
        parts = {name: np.full(calls, seconds) for name, seconds in self.parts.items()}
        return CallTimes(total=self.slower * self.seconds * jitter, **parts)

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[LayerTime, ...]:
        return ()

    def close(self) -> None: ...

    def __enter__(self) -> "Timed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class OnGpu(Timed):
    """A session whose calls really take the time, on a GPU."""

    on_gpu = True

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        time.sleep(calls * self.seconds)
        return super().time(feeds, calls)


class Slowing(Timed):
    """Every turn takes longer than the one before, as on a machine that heats up."""

    temperature = 1.0

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        Slowing.temperature *= 1.02
        self.slower = Slowing.temperature
        return super().time(feeds, calls)


class Sleeping(Timed):
    """A session that really takes the time."""

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        time.sleep(calls * self.seconds)
        return super().time(feeds, calls)


def feeds(*batches: int) -> dict[int, dict[str, np.ndarray[Any, Any]]]:
    return {batch: {"images": np.zeros((batch, 3, 32, 32), np.float32)} for batch in batches}


def together(
    sessions: Mapping[str, Session], arrays: Mapping[int, Arrays], settings: BenchSettings = QUICK
) -> LatencyReport:
    """All sessions on the same inputs."""
    return interleave(sessions, dict.fromkeys(sessions, arrays), settings)


def test_statistics_are_those_of_the_definition() -> None:
    rounds = [CallTimes(np.arange(1, 52) / 1e3), CallTimes(np.arange(52, 102) / 1e3)]
    stats = latency_stats(rounds, batch=8)
    assert (stats.min, stats.median, stats.mean) == pytest.approx((1, 51, 51))
    assert (stats.p90, stats.p95, stats.p99) == pytest.approx((91, 96, 100))
    assert stats.cv == pytest.approx(np.arange(1, 102).std() / 51)
    # medians of the rounds are 26 and 76.5; both are 25.25 away from their median
    assert stats.drift == pytest.approx(1.4826 * 25.25 / 51.25)
    assert stats.quantiles == pytest.approx(np.arange(1, 102, 2))
    assert stats.images_per_second == pytest.approx(8 / 0.051)
    assert stats.iterations == 101
    assert stats.unstable
    assert (stats.h2d, stats.compute, stats.d2h, stats.enqueue) == (None,) * 4
    assert not latency_stats([CallTimes(np.array([0.0100, 0.0101, 0.0099]))], batch=1).unstable


def test_parts_of_a_call_are_medians_of_their_own() -> None:
    times = CallTimes(
        total=np.array([5.0, 5.0, 5.0, 50.0]) / 1e3,
        h2d=np.array([1.0, 1.0, 3.0, 3.0]) / 1e3,
        compute=np.array([2.0, 2.0, 2.0, 9.0]) / 1e3,
        enqueue=np.array([1.7, 1.7, 1.7, 1.7]) / 1e3,
    )
    stats = latency_stats([times, times], batch=1)
    assert (stats.h2d, stats.compute, stats.enqueue) == pytest.approx((2.0, 2.0, 1.7))
    assert stats.d2h is None


def test_sessions_take_turns_and_every_turn_starts_warm() -> None:
    calls: list[tuple[str, int, int]] = []
    sessions = {name: Timed(name, 1e-3, calls) for name in ("a", "b", "c")}
    report = together(sessions, feeds(1, 8), QUICK)
    of_batch_8 = [name for name, batch, _ in calls if batch == 8]
    # warm-up once each, then an untimed call and a turn each; the order turns around every round
    assert of_batch_8[:3] == ["a", "b", "c"]
    assert of_batch_8[3:] == [*"aabbcc", *"ccbbaa", *"aabbcc", *"ccbbaa"]
    assert [count for _, batch, count in calls if batch == 8][3::2] == [1] * 12
    assert set(report.stats) == {"a", "b", "c"}
    assert set(report.stats["c"]) == {1, 8}
    assert report.stats["a"][8].iterations == 4 * 8 >= 30
    assert len(report.rounds["b"][1]) == 4


def test_sessions_on_gpus_take_turns_among_themselves_and_begin_each_after_some_time_of_work() -> None:
    calls: list[tuple[str, int, int]] = []
    sessions: dict[str, Session] = {
        "cpu": Timed("cpu", 1e-3, calls), "gpu": OnGpu("gpu", 1e-3, calls),
        "other cpu": Timed("other cpu", 1e-3, calls), "other gpu": OnGpu("other gpu", 1e-3, calls),
    }  # fmt: skip
    settings = BenchSettings(
        seconds=0.02, warmup=1, warmup_seconds=0, turn_seconds=0.05, rounds=2, min_iterations=6, max_iterations=6
    )
    report = together(sessions, feeds(1), settings)
    order = [name for name, _ in itertools.groupby(calls, key=lambda call: call[0])]
    of_gpus, of_cpus = order[: order.index("cpu")], order[order.index("cpu") :]
    assert of_gpus == ["gpu", "other gpu", "gpu", "other gpu", "gpu"]
    assert of_cpus == ["cpu", "other cpu", "cpu", "other cpu", "cpu"]
    # two rounds of three timed calls, each after 50 ms of calls of a bit more than 1 ms
    warm = sum(count for name, _, count in calls if name == "gpu") - 6 - 1
    assert 2 * 10 <= warm <= 2 * 51
    assert sum(count for name, _, count in calls if name == "cpu") == 1 + 2 * (1 + 3)
    assert {name: stats[1].iterations for name, stats in report.stats.items()} == dict.fromkeys(sessions, 6)


def test_the_ratio_of_any_two_is_free_of_drift() -> None:
    sessions = {"dense": Slowing("dense", 4e-3), "int8": Slowing("int8", 2e-3), "pruned": Slowing("pruned", 1e-3)}
    report = together(sessions, feeds(1), QUICK)
    times = report.stats["dense"][1]
    assert times.unstable
    assert times.drift > 0.05
    assert report.ratio("dense", "pruned", 1).median == pytest.approx(4, rel=0.05)
    assert report.ratio("int8", "pruned", 1).median == pytest.approx(2, rel=0.05)
    assert report.ratio("pruned", "dense", 1).median == pytest.approx(1 / 4, rel=0.05)
    speedup = report.ratio("dense", "pruned", 1)
    assert speedup.low < speedup.median < speedup.high
    with pytest.raises(KeyError):
        report.ratio("dense", "pruned", 8)


def test_every_session_gets_an_equal_share_of_the_time() -> None:
    sessions = {"slow": Timed("slow", 10e-3), "fast": Timed("fast", 1e-3)}
    long = together(sessions, feeds(1), BenchSettings(seconds=2, warmup=1, warmup_seconds=0, rounds=2))
    assert long.stats["slow"][1].iterations == pytest.approx(100, abs=2)
    assert long.stats["fast"][1].iterations == pytest.approx(1000, abs=2)
    assert long.seconds == pytest.approx(2, rel=0.02)
    short = BenchSettings(seconds=0.001, warmup=1, warmup_seconds=0, rounds=2, min_iterations=30)
    assert together(sessions, feeds(1), short).stats["slow"][1].iterations == 30
    capped = BenchSettings(seconds=5, warmup=1, warmup_seconds=0, rounds=2, min_iterations=4, max_iterations=6)
    assert together(sessions, feeds(1), capped).stats["fast"][1].iterations == 6


def test_warm_up_lasts_both_calls_and_time() -> None:
    calls: list[tuple[str, int, int]] = []
    quick = {"a": Sleeping("a", 1e-3, calls)}
    together(quick, feeds(1), BenchSettings(seconds=0.01, warmup=7, warmup_seconds=0.2, rounds=2, min_iterations=2))
    assert calls[0][2] == 7
    turns = [("a", 1, 1), ("a", 1, 5)]  # 10 ms are ten calls in two rounds
    assert calls[-4:] == turns * 2
    warm_up = [count for _, _, count in calls[:-4]]
    assert sum(warm_up) >= 100  # 200 ms of calls of a bit more than 1 ms; sleeping overshoots


def test_sessions_may_take_inputs_of_their_own() -> None:
    sessions = {"small": Timed("small", 1e-3), "large": Timed("large", 1e-3)}
    report = interleave(sessions, {"small": feeds(1), "large": feeds(1, 4)}, QUICK)
    assert set(report.stats["small"]) == {1}
    assert set(report.stats["large"]) == {1, 4}
    assert report.ratio("small", "large", 1).median == pytest.approx(1)


def test_warnings_are_those_of_trtexec() -> None:
    host_bound = Timed("a", 2e-3, h2d=1e-4, compute=1e-3, d2h=1e-4, enqueue=0.9e-3)
    copying = Timed("b", 4e-3, h2d=1.5e-3, compute=1e-3, d2h=1.2e-3, enqueue=1e-4)
    sessions = {"host": host_bound, "copies": copying, "heat": Slowing("c", 1e-3), "fine": Timed("d", 1e-3)}
    warnings = together(sessions, feeds(1), QUICK).warnings()
    assert [warning.partition(":")[0] for warning in warnings] == [
        "host, batch 1", "copies, batch 1", "copies, batch 1", "heat, batch 1"
    ]  # fmt: skip
    assert "launch-bound" in warnings[0]
    assert "0.900 ms" in warnings[0]
    assert "input" in warnings[1]
    assert "output" in warnings[2]
    assert "unstable" in warnings[3]
    assert "clocks or other jobs" in warnings[3]


def test_a_report_says_what_it_was_measured_with(vit: Exported) -> None:
    with open_onnx(vit.report.path, threads=1) as dense, open_onnx(vit.report.path, threads=1) as again:
        settings = BenchSettings(seconds=0.1, warmup=1, warmup_seconds=0, rounds=3, min_iterations=30)
        report = together({"dense": dense, "again": again}, feeds(1), settings)
    assert report.settings == BenchSettings(0.1, 1, 0, 3, 30, 2000)
    assert report.sessions["dense"]["intra_op_threads"] == 1
    assert report.stats["again"][1].iterations >= 30
    assert report.seconds > 0
    speedup = report.ratio("dense", "again", 1)
    assert 0.3 < speedup.median < 3.0
    assert speedup.median == np.median(np.array(report.rounds["dense"][1]) / np.array(report.rounds["again"][1]))


def test_throughput_counts_all_streams_at_once() -> None:
    opened: list[Sleeping] = []

    def open_session() -> Sleeping:
        opened.append(Sleeping("stream", 2e-3))
        return opened[-1]

    one = throughput(open_session, feeds(4)[4], streams=1, seconds=0.3)
    three = throughput(open_session, feeds(4)[4], streams=3, seconds=0.3)
    assert len(opened) == 4
    assert 1000 < one < 2000  # 4 images in 2 ms at best
    assert 2 * one < three < 6000
    assert {thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name} == set()
    with pytest.raises(UserError, match="0 streams"):
        throughput(open_session, feeds(1)[1], streams=0, seconds=1)


def test_throughput_of_a_real_session(vit: Exported) -> None:
    found = throughput(lambda: open_onnx(vit.report.path, threads=1), feeds(2)[2], streams=2, seconds=0.2)
    assert found > 10


def test_a_stream_that_fails_closes_all(tmp_path: Path) -> None:
    closed: list[str] = []

    class Failing(Timed):
        def close(self) -> None:
            closed.append(self.name)

        def time(self, feeds: Arrays, calls: int) -> CallTimes:
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("out of memory")
            return super().time(feeds, calls)

    with pytest.raises(RuntimeError, match="out of memory"):
        throughput(lambda: Failing("x", 1e-3), feeds(1)[1], streams=2, seconds=0.1)
    assert closed == ["x", "x"]


def test_energy_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    session = Sleeping("gpu", 5e-3, calls)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert joules_per_image(session, feeds(2)[2], seconds=0.01) is None
    nvml, read_at = FakeNvml(), []

    def energy(handle: str) -> int:  # 5 J between two readings
        read_at.append(len(calls))
        return 5_000 * len(read_at)

    nvml.answers |= {"nvmlDeviceGetTotalEnergyConsumption": energy, "nvmlDeviceGetCount": lambda: 1}
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    calls.clear()
    found = joules_per_image(session, feeds(2)[2], seconds=0.2)
    before, after = read_at
    timed = sum(count for _, _, count in calls[before:after])
    assert before > 0, "the warm-up spends none of the energy"
    assert found == pytest.approx(5.0 / (2 * timed))


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to measure"):
        together({}, feeds(1))
    for settings in ({"rounds": 1}, {"seconds": 0}, {"seconds": float("inf")}, {"warmup": 0}):
        with pytest.raises(UserError, match="too short"):
            BenchSettings(**settings)
