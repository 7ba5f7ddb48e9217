"""What the stages write down for each other and for the report, one class for each JSON file.

Runs of older versions stay readable: a file without `format_version` is of format 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from upvits.calib_data.documents import Count, Name, Number, Scalar, Text
from upvits.deploy.measure.accuracy import Accuracy
from upvits.deploy.measure.parity import Parity
from upvits.toolchain.compensation import CompressionReport

ModelName = Literal["dense", "pruned"]

Sessions = dict[Name, dict[Name, Scalar]]
"""`6-bench/sessions.json`: what sessions ran with, by runtime and precision."""


class NetworkAccuracy(BaseModel):
    """A network in PyTorch on all validation images.

    Attributes:
        top1: percent of the labelled images; None without labels.
        agreement: percent of the images on which it predicts what the dense network predicts; None for that network.
        images: how many there are.
        labelled: how many of them have labels.
        lost: labelled images that only the dense network has right; None for that network and in older runs.
        won: labelled images that only this network has right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    top1: Number | None
    agreement: Number | None
    images: Count
    labelled: Count | None = None
    lost: Count | None = None
    won: Count | None = None


class DenseAccuracy(BaseModel):
    """`0-dense/accuracy.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    dense: NetworkAccuracy


class PrunedAccuracies(BaseModel):
    """`2-prune/accuracy.json`; `after_deletion` is plain deletion of the same units, None without compensation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    dense: NetworkAccuracy
    after_prune: NetworkAccuracy
    after_deletion: NetworkAccuracy | None = None


class TunedAccuracy(BaseModel):
    """`3-distill/accuracy.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    after_distill: NetworkAccuracy
    teacher: NetworkAccuracy | None = None  # where it was not the dense network


class CompensationRecord(BaseModel):
    """`2-prune/compensation.json`: what compensation did, or why it was left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[2] = 2
    left_out: Text | None = None
    report: CompressionReport | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_format_1(cls, values: Any) -> Any:
        """There the entries of the report stood at the top."""
        return {"report": values} if _has_none_of(cls, values) else values

    @property
    def rotated(self) -> tuple[str, ...]:
        """Groups whose basis was rotated before the cut."""
        return () if self.report is None else self.report.rotated


class Parities(BaseModel):
    """`parity.json` of the export and of an engine; None for a model that was held against nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    dense: Parity | None = None
    pruned: Parity | None = None

    @property
    def by_model(self) -> dict[ModelName, Parity]:
        """Those that were measured."""
        parities: dict[ModelName, Parity | None] = {"dense": self.dense, "pruned": self.pruned}
        return {name: parity for name, parity in parities.items() if parity is not None}


class Calibration(BaseModel):
    """Images that ranges of activations were measured on: how many, their sha256, and how ranges follow from values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Count
    digest: Name
    method: Name


class PrecisionRecord(BaseModel):
    """How one network was converted to a precision, and what that costs.

    Attributes:
        base_precision: what the layers that are not quantized compute in.
        in_fp32: kinds of nodes that compute in fp32, in alphabetical order.
        accuracy: of the graph that was kept, against the fp32 graph, on ONNX Runtime's CPU provider.
        drop_without_search: points that were lost before layers were put back.
        graphs_tried: how many graphs the search judged.
        quantized: nodes that compute in int8 or fp8.
        kept: nodes that were kept out of the precision.
        folded: LayerNorms whose outliers moved into weights.
        worst_layer: the converted layer with the largest error, None when there is none.
        worst_layer_sqnr_db: its signal over error, in dB.
        layer_sqnr_db: the same for every layer by node, worst first.
        calibration: None for fp16 and bf16.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    precision: Name
    base_precision: str = Field(alias="rest")
    in_fp32: tuple[str, ...]
    accuracy: Accuracy
    drop_without_search: Number
    graphs_tried: Count
    quantized: tuple[Name, ...]
    kept: tuple[str, ...]
    folded: tuple[str, ...]
    worst_layer: str | None
    worst_layer_sqnr_db: float | None
    layer_sqnr_db: dict[str, float]
    calibration: Calibration | None


class Precisions(BaseModel):
    """`precision.json`: both networks in one precision."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    dense: PrecisionRecord
    pruned: PrecisionRecord

    @property
    def by_model(self) -> dict[ModelName, PrecisionRecord]:
        return {"dense": self.dense, "pruned": self.pruned}


class EngineAccuracy(BaseModel):
    """One engine on the validation images that precisions are judged on, against the fp32 graph of its model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName
    runtime: Name
    precision: Name
    accuracy: Accuracy


class EngineAccuracies(BaseModel):
    """`6-bench/accuracy.json`: all engines that ran."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[2] = 2
    engines: tuple[EngineAccuracy, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_format_1(cls, values: Any) -> Any:
        """There an engine was named by model, runtime and precision in one string."""
        if not _has_none_of(cls, values):
            return values
        fields = ("model", "runtime", "precision")
        engines = [
            {**dict(zip(fields, name.split(), strict=False)), "accuracy": accuracy} for name, accuracy in values.items()
        ]
        return {"engines": engines}


def _has_none_of(kind: type[BaseModel], values: Any) -> bool:
    """Whether values hold something, but no field of this class."""
    return isinstance(values, Mapping) and bool(values) and values.keys().isdisjoint(kind.model_fields)
