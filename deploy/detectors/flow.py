"""From the networks of a run to detectors that are trained, built, measured and compared."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import toolchain
from calib_data.scenes import demo_scenes
from deploy.artifacts import Artifact, disk_errors
from deploy.detectors.compare import compare
from deploy.detectors.engines import Work, engines
from deploy.detectors.recipe import DetectRecipe
from deploy.detectors.training import trained
from deploy.job import Job
from deploy.speed.table import cache_folder
from detection.coco import CocoData, open_coco
from detection.crew import Crew
from detection.training import ALONE


def open_data(coco: str, detector: str = "retinanet", *, quiet: bool) -> CocoData:
    """The data set that a spec names: a folder, or `demo`.

    Raises:
        UserError: it is none, or lacks what the detector learns.
    """
    cache = cache_folder()
    with disk_errors(cache, "data"):
        folder = demo_scenes(cache, quiet=quiet) if coco == "demo" else Path(coco).expanduser().absolute()
        data = open_coco(folder, cache)
    if detector == "mask-rcnn":
        data.require_masks()
    return data


def detectors_of(
    job: Job, tuned: Artifact, data: CocoData, wanted: DetectRecipe, crew: Crew = ALONE
) -> dict[str, Artifact]:
    """Detectors on the backbones that are asked for, by name: trained, or found whole.

    Args:
        job: of the run, in its directory.
        tuned: the artifact of the fine-tuned network.
        data: what they are trained and judged on.
        wanted: resolved.
        crew: processes that train on a share each.
    """
    found: dict[str, Artifact] = {}
    if wanted.backbones != "pruned" or wanted.imitation:
        found["dense"] = trained(job, "dense", job.dense, job.dense_digest, data, wanted, crew=crew)
    if wanted.backbones != "dense":
        teacher = found["dense"] if wanted.imitation else None
        pruned: nn.Module = toolchain.load(tuned.folder / "model")
        found["pruned"] = trained(job, "pruned", pruned, tuned.digest, data, wanted, teacher, crew)
    return found


def compared(job: Job, detectors: dict[str, Artifact], data: CocoData, wanted: DetectRecipe) -> Artifact:
    """Engines of the detectors, and everything about them in one document."""
    work = Work(job, detectors, data, wanted)
    if wanted.detector != "retinanet":
        return compare(work, [], [f"{wanted.detector} has no fixed graph: it is not exported, and not timed."])
    built, notes = engines(work)
    return compare(work, built, notes)
