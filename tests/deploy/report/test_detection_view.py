"""What is said of the engines of detectors."""

from collections.abc import Sequence
from typing import Any

from tests.deploy.report.sample_report import sample_report
from upvits.deploy.report.detection import ITS_GRAPH, ITSELF, DetectionReport, DetectorEngine
from upvits.deploy.report.views import html, sections
from upvits.deploy.report.views.detection import _engines
from upvits.deploy.report.views.page import chapters


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


def detector(model: str, ap: float) -> dict[str, Any]:
    found = {"ap": ap, "ap50": ap + 20, "ap75": ap, "ap_small": None, "ap_medium": ap, "ap_large": ap,
             "per_class": {"cat": ap, "dog": None}, "images": 28}  # fmt: skip
    sizes = {"params": 10**7, "backbone_params": 10**6, "macs": 10**9, "macs_800x1344": 10**10}
    return {"model": model, **sizes, "pytorch": found, "agreement": None}


def test_every_section_is_on_the_page_and_detectors_stand_open_with_their_pictures() -> None:
    engine = {"model": "dense", "runtime": "onnxruntime", "precision": "fp32", "path": "x", "bytes": 10**6, "ap": 30.0,
              "drop": 0.0, "images": 28, "measured_on": ITSELF}  # fmt: skip
    timed = {"runtime": "onnxruntime", "precision": "fp32", "batch": 1, "dense_ms": 9.0, "pruned_ms": 5.0,
             "speedup": 1.8, "low": 1.7, "high": 1.9}  # fmt: skip
    made = sample_report(
        gpu={"clocks": "1980 MHz"},
        detection={
            "coco": "x", "detector": "RetinaNet", "classes": ["cat", "dog"], "train_images": 100, "val_images": 28,
            "size": [64, 64], "schedule": {}, "detectors": [detector("dense", 30.1), detector("pruned", 28.4)],
            "engines": [engine], "latency": [timed],
            "pictures": [{"title": "a.jpg", "data": "data:image/webp;base64,AAAA"}],
        },
    )  # fmt: skip
    shown = [section.anchor for chapter in chapters(made) for section in chapter.sections]
    assert sorted([*shown, "pictures"]) == sorted(section.anchor for section in sections(made))
    assert [chapter.key for chapter in chapters(made) if chapter.open][-1] == "chapter-detection"
    page = html(made)
    assert page.index("data:image/webp;base64,AAAA") < page.index("Everything else")
    assert page.index("AP of the engines") > page.index("Everything else")
