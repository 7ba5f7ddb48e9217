"""Detectors on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from upvits.deploy.detectors.accuracy import read_record
from upvits.deploy.detectors.evaluate import Judged
from upvits.deploy.report.detection import DetectionReport
from upvits.deploy.report.views.detection import sections
from upvits.deploy.report.views.section import without_empty_columns
from upvits.deploy.report.views.text import terminal_sections
from upvits.deploy.stages.documents import ModelName
from upvits.deploy.store.artifacts import Artifact


def trained_table(detectors: Mapping[ModelName, Artifact] | Mapping[str, Artifact]) -> Table:
    """AP and size of detectors that were just trained, by name."""
    records = {str(name): read_record(artifact) for name, artifact in detectors.items()}
    table = _table("", *records)

    def row(title: str, values: Iterable[str | None]) -> None:
        cells = list(values)
        if any(cell is not None for cell in cells):
            table.add_row(title, *(cell or "" for cell in cells))

    row("AP", (f"{100 * r.pytorch.ap:.1f}" for r in records.values()))
    row("AP50", (f"{100 * r.pytorch.ap50:.1f}" for r in records.values()))
    row("AP75", (f"{100 * r.pytorch.ap75:.1f}" for r in records.values()))
    row("AP of masks", (f"{100 * r.masks.ap:.1f}" if r.masks else None for r in records.values()))
    row("validation images", (str(r.pytorch.images) for r in records.values()))
    row("parameters, M", (f"{r.params / 1e6:.2f}" for r in records.values()))
    row(
        "boxes that the ONNX file finds too",
        (f"{r.agreement.matched} of {r.agreement.boxes}" if r.agreement else None for r in records.values()),
    )
    row(
        "GMACs at 800 x 1344",
        (f"{r.macs_800x1344 / 1e9:.1f}" if r.macs_800x1344 else None for r in records.values()),
    )
    return table


def judged_table(judged: Sequence[Judged]) -> Table:
    """AP of detectors on the same images, a row each."""
    masks = any(detector.masks for detector in judged)
    table = _table("detector", "by", "AP", "AP50", "AP75", "S", "M", "L", *(["masks"] if masks else []))
    table.caption = f"on {judged[0].boxes.images} images"
    for detector in judged:
        boxes = detector.boxes
        values = [boxes.ap, boxes.ap50, boxes.ap75, boxes.ap_small, boxes.ap_medium, boxes.ap_large]
        if masks:
            values.append(detector.masks.ap if detector.masks else None)
        table.add_row(
            "/".join(detector.name.split("/")[-2:]), detector.run_by,
            *("-" if value is None else f"{100 * value:.1f}" for value in values),
        )  # fmt: skip
    return table


def comparison_parts(report: DetectionReport) -> Group:
    """The tables of a comparison."""
    return Group(*terminal_sections([without_empty_columns(s) for s in sections(report) if s.rows or s.remarks]))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        words = index == 0 or name == "by"
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    return table
