"""What is said of the engines of detectors."""

from upvits.deploy.report.detection import ITS_GRAPH, ITSELF, DetectionReport, DetectorEngine
from upvits.deploy.report.views.detection import _engines


def test_what_did_not_run_here_is_told_apart() -> None:
    known = {"model": "dense", "ap": 80.0, "drop": 0.1, "images": 200, "kept": [], "bytes": 10**6, "path": "x"}
    engines = [
        DetectorEngine.model_validate({**known, "runtime": runtime, "precision": "fp16", "measured_on": where})
        for runtime, where in (("onnxruntime", ITSELF), ("tensorrt-rtx", ITS_GRAPH))
    ]
    (said,) = _engines(DetectionReport.model_construct(engines=engines)).remarks
    assert "tensorrt-rtx: not run here" in said
    assert "onnxruntime:" not in said
    (said,) = _engines(DetectionReport.model_construct(engines=engines[:1])).remarks
    assert "not run here" not in said
