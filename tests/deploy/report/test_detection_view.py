"""What is said of the engines of detectors."""

from collections.abc import Sequence

from upvits.deploy.report.detection import ITS_GRAPH, ITSELF, DetectionReport, DetectorEngine
from upvits.deploy.report.views.detection import _engines


def report(engines: Sequence[DetectorEngine]) -> DetectionReport:
    return DetectionReport(
        coco="x", detector="x", classes=[], train_images=0, val_images=0, size=(64, 64), schedule={}, detectors=[],
        engines=list(engines),
    )  # fmt: skip


def test_what_did_not_run_here_is_told_apart() -> None:
    known = {"model": "dense", "ap": 80.0, "drop": 0.1, "images": 200, "kept": [], "bytes": 10**6, "path": "x"}
    engines = [
        DetectorEngine.model_validate({**known, "runtime": runtime, "precision": "fp16", "measured_on": where})
        for runtime, where in (("onnxruntime", ITSELF), ("tensorrt-rtx", ITS_GRAPH))
    ]
    (said,) = _engines(report(engines)).remarks
    assert "tensorrt-rtx: not run here" in said
    assert "onnxruntime:" not in said
    (said,) = _engines(report(engines[:1])).remarks
    assert "not run here" not in said
