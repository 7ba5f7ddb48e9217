"""The sections on detectors: AP, cost, engines, classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from upvits.deploy.report.detection import ITS_GRAPH, DetectionReport, DetectorFigures
from upvits.deploy.report.views.section import (
    Cell,
    Row,
    Section,
    count,
    inline,
    megabytes,
    ms,
    points,
    short_count,
    signed,
    times,
    words,
)

_Figure: TypeAlias = Callable[[DetectorFigures], Cell]


def sections(report: DetectionReport | None) -> list[Section]:
    """The sections on detectors, most important first."""
    return [] if report is None else [_result(report), _latency(report), _engines(report), _classes(report)]


def _result(report: DetectionReport) -> Section:
    """Detectors side by side, a figure a row."""
    width, height = report.size[1], report.size[0]
    precision: dict[str, _Figure] = {
        "AP": lambda detector: _ap(detector.pytorch.ap),
        "AP50": lambda detector: _ap(detector.pytorch.ap50),
        "AP75": lambda detector: _ap(detector.pytorch.ap75),
        f"AP, upright images at {width} x {height}": lambda detector: _ap(detector.turned_ap),
        "AP small": lambda detector: _ap(detector.pytorch.ap_small),
        "AP medium": lambda detector: _ap(detector.pytorch.ap_medium),
        "AP large": lambda detector: _ap(detector.pytorch.ap_large),
        "AP of masks": lambda detector: _ap(detector.masks.ap if detector.masks else None),
    }
    size: dict[str, _Figure] = {
        "parameters": lambda detector: count(detector.params),
        "parameters of the backbone": lambda detector: count(detector.backbone_params),
        f"MACs at {height} x {width}": lambda detector: _large(detector.macs),
        "MACs at 800 x 1344": lambda detector: _large(detector.macs_800x1344),
        "boxes that the ONNX file finds too": lambda detector: words(
            f"{detector.agreement.matched} of {detector.agreement.boxes}" if detector.agreement else ""
        ),
    }
    both = len(report.detectors) == 2
    rows: list[Row] = []
    for figures, change in ((precision, _points), (size, _percent)):
        for title, cell in figures.items():
            cells = [cell(detector) for detector in report.detectors]
            if any(shown.text for shown in cells):
                rows.append((words(title), *cells, *([change(*cells)] if both else [])))
    header = ("", *(detector.model for detector in report.detectors), *(("change",) if both else ()))
    trained = f"{report.detector} on {report.train_images} images, judged on {report.val_images}: {report.coco}"
    return Section(
        "detection",
        "Detectors",
        header,
        tuple(rows),
        (trained, inline(report.schedule), *report.notes),
        terminal=tuple(range(len(header))),
    )


def _points(dense: Cell, pruned: Cell) -> Cell:
    """The change of a percentage, in points."""
    return words("") if dense.value is None or pruned.value is None else points(pruned.value - dense.value)


def _percent(dense: Cell, pruned: Cell) -> Cell:
    """The change of a size, in percent of the dense detector's."""
    if dense.value is None or pruned.value is None:
        return words("")
    return words(f"{signed(100 * (pruned.value / dense.value - 1))[:-1]} %")


def _latency(report: DetectionReport) -> Section:
    rows = tuple(
        (
            words(row.runtime),
            words(row.precision),
            count(row.batch),
            ms(row.dense_ms),
            ms(row.pruned_ms),
            times(row.speedup),
            words("" if row.low is None or row.high is None else f"{row.low:.2f} to {row.high:.2f}"),
        )
        for row in report.latency
    )
    return Section(
        "detection-latency",
        "Latency of the detectors",
        ("runtime", "precision", "batch", "dense ms", "pruned ms", "faster", "range"),
        rows,
        (f"Images of {report.size[0]} x {report.size[1]} pixels, boxes decoded; overlaps are suppressed afterwards.",),
        text_columns=(0, 1),
        terminal=(0, 1, 2, 3, 4, 5),
    ) if rows else Section("detection-latency", "Latency of the detectors")  # fmt: skip


def _engines(report: DetectionReport) -> Section:
    rows = tuple(
        (
            words(row.model),
            words(row.runtime),
            words(row.precision),
            _ap(row.ap),
            points(0.0 - row.drop),
            count(len(row.kept)) if row.kept else words(""),
            megabytes(row.bytes),
            words(row.measured_on),
        )
        for row in report.engines
    )
    images = sorted({row.images for row in report.engines})
    remark = f"AP on {inline(images)} validation images; the change is against PyTorch on the same ones, in points."
    graphs = dict.fromkeys(row.runtime for row in report.engines if row.measured_on == ITS_GRAPH)
    if graphs:
        remark += f" {', '.join(graphs)}: not run here; this is the AP of the graphs on ONNX Runtime's CPU provider."
    return Section(
        "detection-engines",
        "AP of the engines",
        ("model", "runtime", "precision", "AP", "change", "layers put back", "MB", "measured on"),
        rows,
        (remark,) if rows else (),
        text_columns=(0, 1, 2, 7),
        terminal=(0, 1, 2, 3, 4),
    )


def _classes(report: DetectionReport) -> Section:
    rows = tuple(
        (words(name), *(_ap(detector.pytorch.per_class.get(name)) for detector in report.detectors))
        for name in report.classes
    )
    return Section(
        "detection-classes",
        "AP of every class",
        ("class", *(detector.model for detector in report.detectors)),
        rows,
        sortable=True,
        shown=12,
    )


def _ap(value: float | None) -> Cell:
    """AP in percent with one decimal, as the field gives it."""
    return Cell("") if value is None else Cell(f"{value:.1f}", value)


def _large(value: int | None) -> Cell:
    return Cell("") if value is None else Cell(short_count(value), value)
