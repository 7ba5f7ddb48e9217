"""Detectors on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from upvits.deploy.detectors.evaluate import Judged
from upvits.deploy.detectors.train_stage import figures_of
from upvits.deploy.report.detection import DetectionReport
from upvits.deploy.report.views.detection import sections
from upvits.deploy.report.views.section import without_empty_columns
from upvits.deploy.report.views.text import terminal_sections
from upvits.deploy.store.artifacts import Artifact


def trained_table(detectors: Mapping[str, Artifact]) -> Table:
    """AP and size of detectors that were just trained."""
    figures = {name: figures_of(artifact) for name, artifact in detectors.items()}
    table = _table("", *figures)
    for title, key in (("AP", "ap"), ("AP50", "ap50"), ("AP75", "ap75")):
        table.add_row(title, *(f"{100 * own['pytorch'][key]:.1f}" for own in figures.values()))
    if all(own["masks"] for own in figures.values()):
        table.add_row("AP of masks", *(f"{100 * own['masks']['ap']:.1f}" for own in figures.values()))
    table.add_row("validation images", *(str(own["pytorch"]["images"]) for own in figures.values()))
    table.add_row("parameters, M", *(f"{own['params'] / 1e6:.2f}" for own in figures.values()))
    found = [own["agreement"] for own in figures.values()]
    if any(found):
        boxes = (f"{one['matched']} of {one['boxes']}" if one else "" for one in found)
        table.add_row("boxes that the ONNX file finds too", *boxes)
    if all(own["macs_800x1344"] for own in figures.values()):
        table.add_row("GMACs at 800 x 1344", *(f"{own['macs_800x1344'] / 1e9:.1f}" for own in figures.values()))
    return table


def judged_table(found: Sequence[Judged]) -> Table:
    """AP of detectors on the same images, a row each."""
    masks = any(one.masks for one in found)
    table = _table("detector", "by", "AP", "AP50", "AP75", "S", "M", "L", *(["masks"] if masks else []))
    table.caption = f"on {found[0].precision.images} images"
    for one in found:
        own = one.precision
        values = [own.ap, own.ap50, own.ap75, own.ap_small, own.ap_medium, own.ap_large]
        if masks:
            values.append(one.masks.ap if one.masks else None)
        table.add_row(
            "/".join(one.name.split("/")[-2:]), one.run_by,
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
