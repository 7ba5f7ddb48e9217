"""What a report says of detectors: the detection section of report.json.

Units: AP in percent, latency in milliseconds per batch, MACs per image.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Name = Literal["dense", "pruned"]

ITSELF, ITS_GRAPH = "the engine", "its graph on ONNX Runtime (CPU)"
"""What AP of an engine was measured on."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApFigures(_Document):
    """AP as COCO defines it, over IoU 0.5 to 0.95; None where the images have no such boxes."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: dict[str, float | None]
    images: int


class BoxAgreement(_Document):
    """Boxes of PyTorch, and how many of them the ONNX file finds too (same class, IoU >= 0.99)."""

    boxes: int
    matched: int
    max_score_difference: float


class DetectorFigures(_Document):
    """A trained detector on one backbone. `macs_800x1344` is what tables of detectors give; `macs` is at `size`.

    `pytorch` is AP on images of `size`; `turned_ap` where upright images are fitted into the turned size, as published
    tables have it. Mask R-CNN, which cannot be exported, has no count of MACs and no agreement, but AP of its `masks`.
    """

    model: Name
    params: int
    backbone_params: int
    macs: int | None
    macs_800x1344: int | None
    pytorch: ApFigures
    turned_ap: float | None = None
    masks: ApFigures | None = None
    agreement: BoxAgreement | None


class DetectorEngine(_Document):
    """A detector in one runtime and precision; `drop` is what its AP lost against PyTorch, on the same images.

    `measured_on` says what ran: the engine itself, or its graph on ONNX Runtime's CPU provider. `path` is relative to
    the run. `kept` layers were put back from int8 or a half precision until the AP held.
    """

    model: Name
    runtime: str
    precision: str
    path: str
    bytes: int
    ap: float
    drop: float
    images: int
    measured_on: str
    kept: list[str] = []


class DetectorLatency(_Document):
    """Both detectors in one runtime and precision, measured in turns: medians, and the ratio within rounds."""

    runtime: str
    precision: str
    batch: int
    dense_ms: float | None
    pruned_ms: float | None
    speedup: float | None
    low: float | None
    high: float | None


class Picture(_Document):
    """A validation image with boxes drawn: the annotated ones, then those of each detector, as a data URI."""

    title: str
    data: str


class DetectionReport(_Document):
    """Detectors on the networks of a run, trained by the same schedule on the same data."""

    coco: str
    detector: str
    classes: list[str]
    train_images: int
    val_images: int
    size: tuple[int, int]
    schedule: dict[str, Any]
    detectors: list[DetectorFigures]
    engines: list[DetectorEngine] = []
    latency: list[DetectorLatency] = []
    pictures: list[Picture] = []
    environment: dict[str, Any] = {}
    notes: list[str] = []
