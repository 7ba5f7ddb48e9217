"""The report keeps what was measured in the agreed names, and its sentences follow from its figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.report.sample_report import latency, sample_document, sample_report
from upvits.calib_data.errors import UserError
from upvits.deploy.choices import BatchProfile
from upvits.deploy.report.document import Report, engine_figures, load_report
from upvits.deploy.report.verdict import comparisons, headline, shortfall, verdict
from upvits.deploy.report.views import save_report
from upvits.deploy.runtimes.interface import Built, Engine


def changed(part: str, **values: Any) -> dict[str, Any]:
    """One part of the document with some of its values replaced."""
    return {part: {**sample_document()[part], **values}}


def best(**values: Any) -> list[dict[str, Any]]:
    """The best of OpenVINO alone, with some of its values replaced."""
    return [{**sample_document()["best"][1], **values}]


def unmeasured() -> Report:
    """A run on a machine that could build engines and run none."""
    nothing: dict[str, Any] = {"speedup": {}, "speedup_low": {}, "speedup_high": {}, "best": [], "accuracy": []}
    nothing |= {"layer_times": [], "throughput": [], "findings": []}
    return sample_report(**nothing, **changed("dense", latency_ms={}), **changed("pruned", latency_ms={}))


def test_the_names_in_the_json_are_the_agreed_ones(tmp_path: Path) -> None:
    save_report(tmp_path, sample_report())
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["format_version"] == 2
    document = sample_document()
    for name in ("model", "ratio", "data", "weights", "speedup", "best", "parity", "stages", "plan", "reproduce"):
        assert written[name] == document[name]
    for model in ("dense", "pruned"):
        assert {"params", "macs", "top1", "latency_ms"} <= set(written[model])
        figures = written[model]["latency_ms"]["openvino"]["int8"]["b8"]
        assert {"median", "p90", "p95", "p99", "cv", "quantiles", "unstable"} <= set(figures)
    assert written["pruned"]["top1_after_prune"] == document["pruned"]["top1_after_prune"]


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    save_report(tmp_path, sample_report())
    assert load_report(tmp_path) == sample_report()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize("text", ['{"model": 3}', "", "[]", '{"format_version": 1}'])
def test_a_missing_or_damaged_report_is_a_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"has no report\.json"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"report\.json (is not valid|was written by another version)"):
        load_report(tmp_path)


def test_the_headline_is_the_fastest_of_the_best() -> None:
    found = headline(sample_report())
    assert found is not None
    assert (found.runtime, found.precision, found.batch) == ("openvino", "int8", 8)
    assert headline(unmeasured()) is None


def test_verdict_names_speed_accuracy_size_and_device() -> None:
    text = verdict(sample_report())
    assert text.startswith("3.77x faster")
    assert "on openvino int8 at batch 8" in text
    assert "0.83 points of top-1 lost (98.92 to 98.08 %)" in text
    assert "0.08 points lost by int8" in text
    assert "74 % fewer parameters" in text
    assert text.endswith("measured on Intel(R) Xeon(R) Processor.")


def test_verdict_without_labels_speaks_of_agreement() -> None:
    unlabelled = sample_report(**changed("dense", top1=None), **changed("pruned", top1=None, top1_after_prune=None))
    assert "the same top-1 as the dense model on 98.5 % of the unlabelled images" in verdict(unlabelled)
    assert "of top-1 lost" not in verdict(unlabelled)


def test_verdict_does_not_call_a_slower_model_faster() -> None:
    slower = sample_report(best=best(speedup=0.8, low=0.75, high=0.85))
    assert verdict(slower).startswith("Not faster: 0.80x the dense speed on openvino int8 at batch 8")


def test_verdict_without_a_measurement_says_so() -> None:
    assert verdict(unmeasured()).startswith("Latency was not measured, ")


def test_a_gain_in_accuracy_is_a_gain() -> None:
    assert "points of top-1 gained (98.92 to 99.50 %)" in verdict(sample_report(**changed("pruned", top1=99.5)))


def test_a_gpu_runtime_is_measured_on_the_gpu() -> None:
    gpus = [{"name": "Imaginary GPU", "memory_gib": 24.0}]
    here = {"cpu": "Imaginary CPU 9000", "gpus": gpus}
    assert verdict(sample_report(best=best(runtime="tensorrt"), environment=here)).endswith("on Imaginary GPU.")
    assert verdict(sample_report(environment=here)).endswith("on Imaginary CPU 9000.")


def test_every_measurement_is_compared_small_batches_first() -> None:
    found = comparisons(sample_report())
    assert len(found) == 12
    assert [(c.runtime, c.precision, c.batch) for c in found[:3]] == [
        ("onnxruntime", "fp32", 1), ("onnxruntime", "fp32", 8), ("onnxruntime", "bf16", 1)]  # fmt: skip
    for c in found:
        assert c.dense.median / c.pruned.median == pytest.approx(c.speedup, abs=0.001)


def of_speedup(small: float, large: float) -> Report:
    """Measured in one runtime and precision, at batch 1 and 8."""
    measured = {"onnxruntime": {"fp32": {"b1": latency(5.0), "b8": latency(15.0, 8)}}}
    speedup = {"onnxruntime": {"fp32": {"b1": small, "b8": large}}}
    return sample_report(
        speedup=speedup, **changed("dense", latency_ms=measured), **changed("pruned", latency_ms=measured)
    )


def test_a_latency_gain_far_below_the_macs_gain_is_explained() -> None:
    text = shortfall(of_speedup(1.4, 3.2))
    assert text is not None
    assert "MACs fell 3.7x" in text
    assert "least on onnxruntime fp32 at batch 1: 1.40x" in text
    assert "3.20x" not in text  # more than half of the way from 1x to 3.7x
    assert "fixed cost per layer" in text


def test_a_latency_gain_near_the_macs_gain_needs_no_excuse() -> None:
    assert shortfall(of_speedup(2.6, 3.2)) is None


def test_an_engine_is_described_by_its_place_in_the_run(tmp_path: Path) -> None:
    made = Built(
        source="engine inspector",
        layers=40,
        by_precision={"fp16": 40},
        gemms={"fp16": 25},
        planned={"fp16": 25},
        attention_blocks=12,
        attention_fused=12,
        casts=0,
        reformats=3,
        memory_bytes=1_000_000,
    )
    engine = Engine(
        runtime="tensorrt-rtx",
        precision="fp16",
        targets=("sm86", "sm89"),
        folder=tmp_path / "5-engine/x",
        file="engine.plan",
        bytes=10,
        seconds=1.5,
        sha256="0",
        library="tensorrt_rtx",
        library_version="1.7",
        onnx_sha256="0",
        batch=BatchProfile(),
        settings={},
        built=made,
    )
    figures = engine_figures("dense", engine, tmp_path)
    assert (figures.target, figures.path, figures.bytes) == ("sm86, sm89", "5-engine/x/engine.plan", 10)
    assert figures.built is not None
    assert (figures.built.gemms, figures.built.attention_fused) == ({"fp16": 25}, 12)
