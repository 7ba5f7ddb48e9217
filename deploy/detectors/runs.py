"""Detectors on the networks of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import toolchain
from calib_data.errors import UserError
from calib_data.scenes import demo_scenes
from deploy.artifacts import open_artifact
from deploy.detectors.recipe import DetectRecipe, resolved
from deploy.detectors.stage import detect, figures_of
from deploy.pipeline import prepare
from deploy.recipe import IDENTITY, make_recipe
from deploy.run_dir import open_run, read_recipe
from deploy.speed.table import cache_folder
from detection.coco import CocoData, open_coco

Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Detected:
    """Figures of the detectors of a run (`ap.json`) by backbone, and what is odd about the data."""

    run: Path
    figures: Figures
    notes: tuple[str, ...]


def open_data(coco: str, *, quiet: bool) -> CocoData:
    """The data set that a spec names: a folder, or `demo`."""
    folder = demo_scenes(cache_folder(), quiet=quiet) if coco == "demo" else Path(coco).expanduser().absolute()
    return open_coco(folder)


def detect_in_run(run: Path, wanted: DetectRecipe, *, quiet: bool = True) -> Detected:
    """Train detectors on a run's backbones, or continue; detectors that are whole are kept.

    Raises:
        UserError: the run has no fine-tuned network yet, or nothing can be learnt from the data.
        MissingDependencyError: mmdet is not there.
    """
    wanted = resolved(wanted)
    data = open_data(wanted.coco, quiet=quiet)
    job = prepare(make_recipe(read_recipe(run)), run, quiet=quiet)
    tuned = open_artifact(run / "3-distill")
    if tuned is None:
        raise UserError(
            f"{run} has no fine-tuned network.", fix=f"Run `upvits-deploy distill --recipe {run} --output {run}` first."
        )
    with open_run(job.folder, job.recipe.model_dump(), IDENTITY):
        artifacts = {}
        if wanted.backbones != "pruned" or wanted.imitation:
            artifacts["dense"] = detect(job, "dense", job.dense, job.dense_digest, data, wanted)
        if wanted.backbones != "dense":
            teacher = artifacts["dense"] if wanted.imitation else None
            pruned = toolchain.load(tuned.folder / "model")
            artifacts["pruned"] = detect(job, "pruned", pruned, tuned.digest, data, wanted, teacher)
    return Detected(run, {name: figures_of(own) for name, own in artifacts.items()}, data.notes)


def detection_table(found: Detected) -> Table:
    """For a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in found.figures:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "AP": lambda own: f"{100 * own['pytorch']['ap']:.1f}",
        "AP50": lambda own: f"{100 * own['pytorch']['ap50']:.1f}",
        "AP75": lambda own: f"{100 * own['pytorch']['ap75']:.1f}",
        "AP of the ONNX file": lambda own: f"{100 * own['onnxruntime']['ap']:.1f}",
        "boxes that agree": lambda own: f"{own['agreement']['matched']} of {own['agreement']['boxes']}",
        "parameters, M": lambda own: f"{own['params'] / 1e6:.2f}",
        "MACs at 800 x 1344, G": lambda own: f"{own['macs_800x1344'] / 1e9:.1f}",
    }
    for title, text in rows.items():
        table.add_row(title, *(text(own) for own in found.figures.values()))
    return table
