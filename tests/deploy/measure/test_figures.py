"""From measurements to figures: ratios within rounds, and the precision to deploy."""

from pathlib import Path

import numpy as np
import pytest

from upvits.deploy.choices import BatchProfile
from upvits.deploy.measure.accuracy import Accuracy
from upvits.deploy.measure.bench import BenchSettings, LatencyReport, latency_stats
from upvits.deploy.measure.document import Bench
from upvits.deploy.measure.figures import EnginePair, bench_figures, findings
from upvits.deploy.runtimes.interface import CallTimes, Engine, LayerTime
from upvits.toolchain.planning import PruningPlan, Size
from upvits.toolchain.structure.groups import Widths

MS = {"dense": {"fp32": 10.0, "int8": 7.0, "bf16": 6.0}, "pruned": {"fp32": 5.0, "int8": 4.0, "bf16": 2.0}}
PAIRS = [EnginePair("onnxruntime", precision) for precision in ("fp32", "int8", "bf16")]


def measured() -> LatencyReport:
    """Two rounds at batch 8; the second takes twice as long for everybody."""
    report = LatencyReport({}, {}, {}, BenchSettings(), 1.0)
    for model, by_precision in MS.items():
        for precision, ms in by_precision.items():
            name = EnginePair("onnxruntime", precision).session(model)
            rounds = [CallTimes(np.full(10, factor * ms / 1e3)) for factor in (1, 2)]
            report.stats[name] = {8: latency_stats(rounds, 8)}
            report.rounds[name] = {8: (ms, 2 * ms)}
            report.sessions[name] = {"intra_op_threads": 2}
    return report


def costs(**drops: float) -> dict[str, Accuracy]:
    return {
        EnginePair("onnxruntime", precision).session(model): Accuracy(100, 90.0, 99.0, drops.get(precision, 0.0), 40.0)
        for model in ("dense", "pruned")
        for precision in MS["dense"]
    }


def figures(**drops: float) -> Bench:
    return bench_figures(measured(), PAIRS, costs(**drops), 0.5, {("pruned onnxruntime fp32", 8): 0.25})


def test_every_pair_is_there_with_ratios_within_rounds() -> None:
    found = figures()
    assert found.speedup["onnxruntime"] == {"fp32": {8: 2.0}, "int8": {8: 1.75}, "bf16": {8: 3.0}}
    assert found.speedup_low == found.speedup == found.speedup_high  # both rounds say the same
    pruned = found.pruned["onnxruntime"]["fp32"][8]
    assert (pruned.min, pruned.n, pruned.threads, pruned.joules_per_image) == (5.0, 20, 2, 0.25)
    assert len(pruned.quantiles) == 51
    assert found.dense["onnxruntime"]["fp32"][8].joules_per_image is None


def test_the_fastest_precision_that_keeps_its_accuracy_is_the_best() -> None:
    (best,) = figures().best
    assert (best.precision, best.dense_precision, best.batch) == ("bf16", "fp32", 8)
    assert best.speedup == 5.0  # dense fp32 to pruned bf16
    assert set(best.passed_over) == {"fp32", "int8"}
    assert best.passed_over["int8"] == "0.50x the speed of bf16 (0.50 to 0.50 over rounds)"


def test_a_narrower_precision_that_is_not_surely_faster_is_passed_over() -> None:
    report = measured()
    report.rounds["pruned onnxruntime int8"] = {8: (4.0, 11.0)}  # faster in the first round, slower in the second
    (best,) = bench_figures(report, PAIRS[:2], costs(), 0.5, {}).best
    assert best.precision == "fp32"
    assert best.passed_over["int8"].startswith("1.08x the speed of fp32 (0.94 to 1.22")


def test_a_precision_that_loses_too_much_is_passed_over_however_fast() -> None:
    (best,) = figures(bf16=0.8).best
    assert best.precision == "int8"
    assert best.passed_over["bf16"] == "loses 0.80 points, 0.5 are allowed"


def test_nothing_measured_gives_no_figures() -> None:
    assert bench_figures(None, [], {}, 0.5, {}) == Bench()
    assert findings(Bench(), plan(), {}, {}) == []


def plan() -> PruningPlan:
    return PruningPlan(
        keep={"mlp": tuple(range(12))},
        num_heads={},
        architecture=None,
        asked={"ratio": 0.5},
        before=Size(params=100, macs=4000),
        after=Size(params=50, macs=100),
        dense_widths=Widths({"mlp": 24, "embed": 32}),
        method="random",
        model_digest="",
    )


def test_findings_are_about_the_fastest_pair() -> None:
    engine = Engine(
        folder=Path("e"), runtime="onnxruntime", precision="bf16", targets=(), file="model.onnx", bytes=1, seconds=1.0,
        sha256="", library="onnxruntime", library_version="1", onnx_sha256="", batch=BatchProfile(), settings={},
    )  # fmt: skip
    layers = [LayerTime("a", "MatMul", 1.0, "bf16", 10), LayerTime("b", "Softmax", 1.0, "bf16", 10)]
    found = findings(figures(), plan(), dict.fromkeys(PAIRS, (engine, engine)), dict.fromkeys(PAIRS, (layers, layers)))
    assert found
    assert all(finding.evidence.startswith("onnxruntime bf16, batch 8") for finding in found)
    assert any("12" in finding.evidence for finding in found if finding.cause == "misaligned widths")


@pytest.mark.parametrize("model", ["dense", "pruned"])
def test_sessions_are_named_so_that_people_can_read_them(model: str) -> None:
    assert EnginePair("openvino", "int8").session(model) == f"{model} openvino int8"
