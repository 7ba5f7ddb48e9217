"""What the stages of detectors write down for each other and for the report, one class for each JSON file.

AP is in [0, 1] in the record of a detector, and in percent in those of its engines, as in the report.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from upvits.calib_data.documents import Count, Name, Natural, Number
from upvits.deploy.report.detection import ITS_GRAPH, BoxAgreement
from upvits.deploy.stages.documents import ModelName
from upvits.detection.average_precision import AveragePrecision


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DetectorRecord(_Document):
    """`ap.json` of a detector: what PyTorch finds on all validation images, and how large the detector is.

    Attributes:
        size: (height, width) of the images in pixels.
        pytorch: AP of boxes.
        turned: the same where upright images are fitted into the turned size; None where both sides are equal.
        masks: AP of masks; None for detectors without.
        params: of the whole detector.
        macs: per image of `size` up to the head's levels; None for detectors that are not exported.
        macs_800x1344: per image of that size, which published tables use.
        agreement: between PyTorch and the ONNX file; None where nothing was exported.
    """

    format_version: Literal[1] = 1
    size: tuple[Natural, Natural]
    pytorch: AveragePrecision
    turned: AveragePrecision | None
    masks: AveragePrecision | None
    params: Natural
    backbone_params: Natural
    macs: Natural | None
    macs_800x1344: Natural | None
    agreement: BoxAgreement | None


class ApRecord(_Document):
    """AP of one detector in one precision.

    Attributes:
        ap: percent.
        drop: points that it lies below PyTorch's on the same images.
        images: that it was measured on.
        measured_on: the engine, or its graph on ONNX Runtime.
        kept: names of the nodes that were kept out of the precision until the AP held.
        graphs_tried: to find them; None in the records of engines.
    """

    ap: Number
    drop: Number
    images: Count
    measured_on: Name = ITS_GRAPH
    kept: tuple[Name, ...] = ()
    graphs_tried: Count | None = None


class ApRecords(_Document):
    """`ap.json` of the graphs or engines of one precision; None for a backbone without a detector."""

    format_version: Literal[1] = 1
    dense: ApRecord | None = None
    pruned: ApRecord | None = None

    @property
    def by_model(self) -> dict[ModelName, ApRecord]:
        """Records of the detectors that there are."""
        records: dict[ModelName, ApRecord | None] = {"dense": self.dense, "pruned": self.pruned}
        return {name: record for name, record in records.items() if record is not None}


class TrainingRecord(_Document):
    """`training.json`: what a detector was trained with.

    Attributes:
        version: of the training's code.
        settings: by name.
        inputs: digests of the backbone, the training images, and the detector that was imitated.
    """

    version: Count
    settings: dict[Name, JsonValue]
    inputs: dict[Name, Name]
