"""From the networks of a run to detectors that are trained, built, measured and compared."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upvits import toolchain
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.scenes import demo_scenes
from upvits.deploy.detectors.compare import compare
from upvits.deploy.detectors.engines import Work, engines
from upvits.deploy.detectors.train_stage import DETECT, require_same_training, trained
from upvits.deploy.recipe.detect import DetectRecipe, make_detect_recipe, place_of, resolved
from upvits.deploy.speed.table import cache_folder
from upvits.deploy.stages.job import Job, write_json
from upvits.deploy.store.artifacts import Artifact, disk_errors
from upvits.detection import openmm
from upvits.detection.coco import CocoData, open_coco
from upvits.toolchain.training.crew import ALONE, Crew

RECIPE = "recipe.json"


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


def check_request(wanted: DetectRecipe) -> None:
    """What can be said before anything is trained.

    Raises:
        UserError: mixed precision without a GPU.
        MissingDependencyError: mmdet, or TensorBoard where it is asked for, is not there.
    """
    openmm.require()
    if wanted.amp and not torch.cuda.is_available():
        raise UserError("--amp needs an NVIDIA GPU.", fix="Leave it out: on CPUs training runs in fp32.")
    if wanted.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingDependencyError("--tensorboard needs TensorBoard.", fix="Run: pip install tensorboard")


def remembered(folder: Path, wanted: DetectRecipe) -> DetectRecipe:
    """The resolved recipe: what was not given is as in the run's last training on the same data.

    Args:
        folder: of the run.
        wanted: with the values that were given.
    """
    given = wanted.model_dump(include=wanted.model_fields_set)
    path = folder / DETECT / RECIPE
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if "coco" in given and place_of(given["coco"]) != known.get("coco"):
        known = {}
    if "scale" in given:
        known.pop("size", None)
    return resolved(make_detect_recipe({**known, **given}))


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
    digests = {"dense": job.dense_digest, "pruned": tuned.digest}
    names = [name for name in digests if wanted.backbones in ("both", name) or (name == "dense" and wanted.imitation)]
    for name in names:
        require_same_training(job, name, digests[name], data, wanted)
    (job.folder / DETECT).mkdir(exist_ok=True)
    write_json(job.folder / DETECT / RECIPE, wanted.model_dump(mode="json", exclude_none=True))
    found: dict[str, Artifact] = {}
    for name in names:
        backbone: nn.Module = job.dense if name == "dense" else toolchain.load(tuned.folder / "model")
        teacher = found["dense"] if name == "pruned" and wanted.imitation else None
        found[name] = trained(job, name, backbone, digests[name], data, wanted, teacher, crew)
    return found


def compared(job: Job, detectors: dict[str, Artifact], data: CocoData, wanted: DetectRecipe) -> Artifact:
    """Engines of the detectors, and everything about them in one document."""
    work = Work(job, detectors, data, wanted)
    if wanted.detector != "retinanet":
        return compare(work, [], [f"{wanted.detector} has no fixed graph: it is not exported, and not timed."])
    built, notes = engines(work)
    return compare(work, built, notes)
