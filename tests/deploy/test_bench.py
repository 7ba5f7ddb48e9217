"""Bench: the figures are those of the call times, and drift hits everybody alike."""

import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from calib_data.errors import UserError
from deploy.bench import BenchSettings, interleave, latency_stats
from deploy.runtimes import open_onnx
from deploy.runtimes.interface import Arrays

from .conftest import Exported


class Timed:
    """A session that takes as long as it is told and remembers when it was called."""

    input_names = ("images",)
    output_names = ("logits",)
    settings: Mapping[str, str | int | bool] = {"device": "clock"}

    def __init__(self, name: str, seconds: float, calls: list[tuple[str, int]]) -> None:
        self.name, self.seconds, self.calls = name, seconds, calls

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self.calls.append((self.name, len(feeds["images"])))
        time.sleep(self.seconds)
        return {}

    def close(self) -> None: ...

    def __enter__(self) -> "Timed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def feeds(*batches: int) -> dict[int, dict[str, np.ndarray[Any, Any]]]:
    return {batch: {"images": np.zeros((batch, 3, 32, 32), np.float32)} for batch in batches}


def test_statistics_are_those_of_the_definition() -> None:
    stats = latency_stats(np.arange(1, 102) / 1e3, batch=8)
    assert (stats.min, stats.median, stats.mean, stats.p90, stats.p99) == pytest.approx((1, 51, 51, 91, 100))
    assert stats.cv == pytest.approx(np.arange(1, 102).std() / 51)
    assert stats.images_per_second == pytest.approx(8 / 0.051)
    assert stats.iterations == 101
    assert stats.unstable
    assert not latency_stats(np.array([0.0100, 0.0101, 0.0099]), batch=1).unstable


def test_sessions_take_turns_and_the_ratio_is_theirs() -> None:
    calls: list[tuple[str, int]] = []
    sessions = {"dense": Timed("dense", 4e-3, calls), "pruned": Timed("pruned", 1e-3, calls)}
    settings = BenchSettings(seconds=0.05, warmup=2, rounds=4, min_iterations=30)
    report = interleave(sessions, feeds(1, 8), settings)
    assert report.reference == "dense"
    for batch in (1, 8):
        # Sleeping overshoots on a busy machine, more for the shorter one.
        assert 1.3 < report.speedup["pruned"][batch].median < 4.5
        assert report.speedup["pruned"][batch].low <= report.speedup["pruned"][batch].high
        assert report.stats["dense"][batch].min >= 4.0
        assert report.stats["dense"][batch].iterations >= 30
    assert set(report.speedup) == {"pruned"}
    of_batch_1 = [name for name, batch in calls if batch == 1]
    turns = [name for index, name in enumerate(of_batch_1) if index == 0 or of_batch_1[index - 1] != name]
    # Warm-up once each, then the order turns around every round: neighbours across rounds melt together.
    assert turns == ["dense", "pruned", "dense", "pruned", "dense", "pruned", "dense"]


def test_budget_limits_long_calls_to_the_minimum_and_stretches_short_ones() -> None:
    calls: list[tuple[str, int]] = []
    quick = {"dense": Timed("dense", 1e-3, calls)}
    long = interleave(quick, feeds(1), BenchSettings(seconds=0.3, warmup=1, rounds=2, min_iterations=30))
    short = interleave(quick, feeds(1), BenchSettings(seconds=0.001, warmup=1, rounds=2, min_iterations=30))
    assert short.stats["dense"][1].iterations == 30
    assert long.stats["dense"][1].iterations > 30
    capped = BenchSettings(seconds=5, warmup=1, rounds=2, min_iterations=4, max_iterations=6)
    assert interleave(quick, feeds(1), capped).stats["dense"][1].iterations == 6


def test_report_is_json_with_what_it_was_measured_on(vit: Exported) -> None:
    with open_onnx(vit.report.path, threads=1) as dense, open_onnx(vit.report.path, threads=1) as again:
        settings = BenchSettings(seconds=0.1, warmup=1, rounds=3, min_iterations=30)
        report = interleave({"dense": dense, "again": again}, feeds(1), settings)
    document = json.loads(json.dumps(report.as_json()))
    assert document["settings"] == {
        "seconds": 0.1, "warmup": 1, "rounds": 3, "min_iterations": 30, "max_iterations": 2000
    }  # fmt: skip
    assert document["sessions"]["dense"]["intra_op_threads"] == 1
    assert document["stats"]["again"]["b1"]["iterations"] >= 30
    assert 0.3 < document["speedup"]["again"]["b1"]["median"] < 3.0
    assert document["seconds"] > 0


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to measure"):
        interleave({}, feeds(1))
    with pytest.raises(UserError, match="too short"):
        BenchSettings(rounds=1)
    with pytest.raises(UserError, match="too short"):
        BenchSettings(seconds=0)
