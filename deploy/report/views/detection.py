"""The sections on detectors: AP, cost, engines, classes."""

from __future__ import annotations

from collections.abc import Callable

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


def sections(report: DetectionReport | None) -> list[Section]:
    """What there is to show of detectors, most important first."""
    return [] if report is None else [_result(report), _latency(report), _engines(report), _classes(report)]


def _result(report: DetectionReport) -> Section:
    """Detectors side by side, a figure a row."""
    shown: dict[str, Callable[[DetectorFigures], Cell]] = {
        "AP": lambda own: _ap(own.pytorch.ap),
        "AP50": lambda own: _ap(own.pytorch.ap50),
        "AP75": lambda own: _ap(own.pytorch.ap75),
        f"AP, upright images at {report.size[1]} x {report.size[0]}": lambda own: _ap(own.turned_ap),
        "AP small": lambda own: _ap(own.pytorch.ap_small),
        "AP medium": lambda own: _ap(own.pytorch.ap_medium),
        "AP large": lambda own: _ap(own.pytorch.ap_large),
        "AP of masks": lambda own: _ap(own.masks.ap if own.masks else None),
        "parameters": lambda own: count(own.params),
        "parameters of the backbone": lambda own: count(own.backbone_params),
        f"MACs at {report.size[0]} x {report.size[1]}": lambda own: _large(own.macs),
        "MACs at 800 x 1344": lambda own: _large(own.macs_800x1344),
        "boxes that the ONNX file finds too": lambda own: words(
            f"{own.agreement.matched} of {own.agreement.boxes}" if own.agreement else ""
        ),
    }
    rows = [(words(title), *(cell(own) for own in report.detectors)) for title, cell in shown.items()]
    rows = [row for row in rows if any(cell.text for cell in row[1:])]
    both = len(report.detectors) == 2
    if both:
        rows = [(*row, _change(row)) for row in rows]
    header = ("", *(own.model for own in report.detectors), *(("change",) if both else ()))
    trained = f"{report.detector} on {report.train_images} images, judged on {report.val_images}: {report.coco}"
    return Section(
        "detection",
        "Detectors",
        header,
        tuple(rows),
        (trained, inline(report.schedule), *report.notes),
        terminal=tuple(range(len(header))),
    )


def _change(row: Row) -> Cell:
    dense, pruned = row[1].value, row[2].value
    if dense is None or pruned is None:
        return words("")
    if row[0].text.startswith("AP"):
        return points(pruned - dense)
    return words(f"{signed(100 * (pruned / dense - 1))[:-1]} %")


def _latency(report: DetectionReport) -> Section:
    rows = tuple(
        (
            words(one.runtime),
            words(one.precision),
            count(one.batch),
            ms(one.dense_ms),
            ms(one.pruned_ms),
            times(one.speedup),
            words("" if one.low is None or one.high is None else f"{one.low:.2f} to {one.high:.2f}"),
        )
        for one in report.latency
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
            words(one.model),
            words(one.runtime),
            words(one.precision),
            _ap(one.ap),
            points(0.0 - one.drop),
            count(len(one.kept)) if one.kept else words(""),
            megabytes(one.bytes),
            words(one.measured_on),
        )
        for one in report.engines
    )
    images = sorted({one.images for one in report.engines})
    remark = f"AP on {inline(images)} validation images; the change is against PyTorch on the same ones, in points."
    graphs = dict.fromkeys(one.runtime for one in report.engines if one.measured_on == ITS_GRAPH)
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
        (words(name), *(_ap(own.pytorch.per_class.get(name)) for own in report.detectors)) for name in report.classes
    )
    return Section(
        "detection-classes",
        "AP of every class",
        ("class", *(own.model for own in report.detectors)),
        rows,
        sortable=True,
        shown=12,
    )


def _ap(value: float | None) -> Cell:
    """AP in percent with one decimal, as the field gives it."""
    return Cell("") if value is None else Cell(f"{value:.1f}", value)


def _large(value: int | None) -> Cell:
    return Cell("") if value is None else Cell(short_count(value), value)
