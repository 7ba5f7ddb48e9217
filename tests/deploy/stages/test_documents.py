"""What stages write for each other: read back equal, readable from older runs, and refused when broken."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from upvits.calib_data.errors import UserError
from upvits.deploy.measure.accuracy import Accuracy
from upvits.deploy.measure.parity import FP32, Parity
from upvits.deploy.stages.documents import (
    Calibration,
    CompensationRecord,
    EngineAccuracies,
    EngineAccuracy,
    NetworkAccuracy,
    Parities,
    PrecisionRecord,
    Precisions,
    PrunedAccuracies,
    TunedAccuracy,
)
from upvits.deploy.store.documents import load_document, save_document
from upvits.toolchain.compensation import CompressionReport
from upvits.toolchain.compensation.refit import LayerReport

ACCURACY = Accuracy(images=1000, top1=98.5, agreement=99.8, drop=0.2, sqnr_db=35.65881040478992)
PARITY = Parity("PyTorch", "ONNX Runtime (CPU)", 64, 5e-6, 5.6e-07, 0.99999999, 100.0, 0, 20, FP32, True)
LAYER = LayerReport("blocks.0.mlp.fc1", "refit", 0.1, 0.08, 1e-06, 7628144.37, 104960, 16)
REPORT = CompressionReport(512, 102, ("embed",), (LAYER,), 1.5, 0.4, 0.1, True, ("one warning",), 12.5)
RECORD = PrecisionRecord(
    precision="int8",
    base_precision="fp32",
    in_fp32=("Add", "Gelu"),
    accuracy=ACCURACY,
    drop_without_search=0.7,
    graphs_tried=3,
    quantized=("head",),
    kept=("stem",),
    folded=(),
    worst_layer="head",
    worst_layer_sqnr_db=29.14,
    layer_sqnr_db={"head": 29.14, "never_read": float("inf")},
    calibration=Calibration(images=256, digest="af91", method="max"),
)
DOCUMENTS = (
    PrunedAccuracies(
        dense=NetworkAccuracy(top1=98.9, agreement=None, images=1200),
        after_prune=NetworkAccuracy(top1=98.0, agreement=99.1, images=1200),
    ),
    TunedAccuracy(after_distill=NetworkAccuracy(top1=None, agreement=99.3, images=12)),
    CompensationRecord(report=REPORT),
    CompensationRecord(left_out="it was switched off (--no-compensate)."),
    Parities(dense=PARITY),
    Precisions(dense=RECORD, pruned=RECORD),
    EngineAccuracies(
        engines=(EngineAccuracy(model="pruned", runtime="onnxruntime-cuda", precision="fp16", accuracy=ACCURACY),)
    ),
)


OLDER = (CompensationRecord, EngineAccuracies)
"""These also read an older form."""


def as_written(document: BaseModel, path: Path) -> dict[str, Any]:
    save_document(path, document)
    values: dict[str, Any] = json.loads(path.read_text())
    return values


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
def test_what_is_written_is_read_back(document: BaseModel, tmp_path: Path) -> None:
    values = as_written(document, tmp_path / "document.json")
    assert values["format_version"] == document.model_dump()["format_version"]
    assert load_document(tmp_path / "document.json", type(document), strict=type(document) not in OLDER) == document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
def test_a_run_of_the_first_version_is_read(document: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    values = as_written(document, path)
    del values["format_version"]
    if isinstance(document, EngineAccuracies):
        values = {"pruned onnxruntime-cuda fp16": values["engines"][0]["accuracy"]}
    if isinstance(document, CompensationRecord):
        values = {"left_out": document.left_out} if document.left_out is not None else values["report"]
    if isinstance(document, Parities):
        values = {name: parity for name, parity in values.items() if parity is not None}
    path.write_text(json.dumps(values))
    assert load_document(path, type(document), strict=type(document) not in OLDER) == document


def test_the_names_on_disk_are_those_of_the_first_version(tmp_path: Path) -> None:
    values = as_written(Precisions(dense=RECORD, pruned=RECORD), tmp_path / "precision.json")
    assert values["dense"]["rest"] == "fp32"
    assert "base_precision" not in values["dense"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"dense": ', "EOF"),
        ("[]", "object"),
        ('{"dense": {"top1": 98.9, "agreement": null, "images": "many"}}', "dense.images"),
        ('{"dense": {"top1": 98.9, "agreement": null, "images": 3}}', "after_prune"),
        ('{"format_version": 7}', "7"),
    ],
)
def test_a_broken_file_is_named_with_the_wrong_entry(content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"accuracy\.json") as refusal:
        load_document(path, PrunedAccuracies)
    assert why in refusal.value.why
    assert "upvits-deploy build" in refusal.value.fix


@pytest.mark.parametrize("kind", OLDER)
@pytest.mark.parametrize("content", ["[]", '{"format_version": 1}', '{"dense": 3}'])
def test_what_is_no_first_version_either_is_refused(kind: type[BaseModel], content: str, tmp_path: Path) -> None:
    (tmp_path / "document.json").write_text(content)
    with pytest.raises(UserError):
        load_document(tmp_path / "document.json", kind, strict=False)


def test_a_missing_file_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parity\.json cannot be read"):
        load_document(tmp_path / "parity.json", Parities)
