"""What a report says of detectors: the detection section of report.json.

Units: AP in percent, latency in milliseconds per batch, MACs per image.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from upvits.calib_data.documents import Count, Facts, Name, Natural, Number, Text
from upvits.calib_data.paths import RelativePath
from upvits.deploy.measure.document import Environment

Model = Literal["dense", "pruned"]

ITSELF, ITS_GRAPH = "the engine", "its graph on ONNX Runtime (CPU)"
"""What AP of an engine was measured on."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApFigures(_Document):
    """AP as COCO defines it, over IoU 0.5 to 0.95; None where the images have no such boxes."""

    ap: Number
    ap50: Number
    ap75: Number
    ap_small: Number | None
    ap_medium: Number | None
    ap_large: Number | None
    per_class: dict[Name, Number | None]
    images: Count


class BoxAgreement(_Document):
    """Boxes of PyTorch, and how many of them the ONNX file finds too (same class, IoU >= 0.99)."""

    boxes: Count
    matched: Count
    max_score_difference: Number


class DetectorFigures(_Document):
    """A trained detector on one backbone. `macs_800x1344` is what tables of detectors give; `macs` is at `size`.

    `pytorch` is AP on images of `size`; `turned_ap` where upright images are fitted into the turned size, as published
    tables have it. Mask R-CNN, which cannot be exported, has no count of MACs and no agreement, but AP of its `masks`.
    """

    model: Model
    params: Natural
    backbone_params: Natural
    macs: Natural | None
    macs_800x1344: Natural | None
    pytorch: ApFigures
    turned_ap: Number | None = None
    masks: ApFigures | None = None
    agreement: BoxAgreement | None


class DetectorEngine(_Document):
    """A detector in one runtime and precision; `drop` is what its AP lost against PyTorch, on the same images.

    `measured_on` says what ran: the engine itself, or its graph on ONNX Runtime's CPU provider. `path` is relative to
    the run. `kept` layers were put back from int8 or a half precision until the AP held.
    """

    model: Model
    runtime: Name
    precision: Name
    path: RelativePath
    bytes: Count
    ap: Number
    drop: Number
    images: Count
    measured_on: Name
    kept: list[Name] = []


class DetectorLatency(_Document):
    """Both detectors in one runtime and precision, measured in turns: medians, and the ratio within rounds."""

    runtime: Name
    precision: Name
    batch: Natural
    dense_ms: Number | None
    pruned_ms: Number | None
    speedup: Number | None
    low: Number | None
    high: Number | None


class Picture(_Document):
    """A validation image with boxes drawn: the annotated ones, then those of each detector, as a data URI."""

    title: Name
    data: Annotated[str, Field(max_length=4 << 20, pattern=r"^data:image/webp;base64,[A-Za-z0-9+/=]*$")]


class DetectionReport(_Document):
    """Detectors on the networks of a run, trained by the same schedule on the same data."""

    coco: Name
    detector: Name
    classes: list[Name]
    train_images: Count
    val_images: Count
    size: tuple[Natural, Natural]
    schedule: Facts
    detectors: list[DetectorFigures]
    engines: list[DetectorEngine] = []
    latency: list[DetectorLatency] = []
    pictures: list[Picture] = []
    environment: Environment = Environment()
    notes: list[Text] = []
