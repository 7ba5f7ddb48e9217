"""From the networks of a run to detectors that are trained, built, measured and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from upvits import toolchain
from upvits.deploy.choices import MODELS
from upvits.deploy.detectors.compare import compare
from upvits.deploy.detectors.engines import Work, engines
from upvits.deploy.detectors.train_stage import DETECT, require_same_training, trained
from upvits.deploy.recipe.detect import DetectRecipe, make_detect_recipe, place_of, resolved
from upvits.deploy.recipe.request import Job
from upvits.deploy.stages.documents import ModelName
from upvits.deploy.stages.job import write_json
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import load_document
from upvits.detection.coco import CocoData

_RECIPE = "recipe.json"


def read_detect_recipe(run: Path) -> DetectRecipe | None:
    """The recipe of the last training in a run, or None."""
    path = run / DETECT / _RECIPE
    return load_document(path, DetectRecipe) if path.is_file() else None


def remembered(run: Path, recipe: DetectRecipe) -> DetectRecipe:
    """The resolved recipe: what was not given is as in the run's last training on the same data.

    Args:
        run: its folder.
        recipe: with the values that were given.
    """
    given = recipe.model_dump(include=recipe.model_fields_set)
    last = read_detect_recipe(run)
    if last is None or ("coco" in given and place_of(given["coco"]) != last.coco):
        return resolved(recipe)
    known = last.model_dump(include=last.model_fields_set)
    if "scale" in given:
        known.pop("size", None)
    return resolved(make_detect_recipe({**known, **given}))


def detectors_of(job: Job, tuned: Artifact, data: CocoData, recipe: DetectRecipe) -> dict[ModelName, Artifact]:
    """Detectors on the backbones that are asked for, by name: trained, or as they are where they are whole.

    Args:
        job: of the run, in its directory.
        tuned: the artifact of the fine-tuned network.
        data: what they are trained and judged on.
        recipe: resolved.
    """
    digests: dict[ModelName, str] = {"dense": job.dense_digest, "pruned": tuned.digest}
    names = [n for n in MODELS if recipe.backbones in ("both", n) or (n == "dense" and recipe.imitation)]
    for name in names:
        require_same_training(job, name, digests[name], data, recipe)
    (job.folder / DETECT).mkdir(exist_ok=True)
    write_json(job.folder / DETECT / _RECIPE, recipe.model_dump(mode="json", exclude_none=True))
    detectors: dict[ModelName, Artifact] = {}
    for name in names:
        backbone: nn.Module = job.dense if name == "dense" else toolchain.load(tuned.folder / "model")
        teacher = detectors["dense"] if name == "pruned" and recipe.imitation else None
        detectors[name] = trained(job, name, backbone, digests[name], data, recipe, teacher)
    return detectors


def compared(job: Job, detectors: Mapping[ModelName, Artifact], data: CocoData, recipe: DetectRecipe) -> Artifact:
    """Engines of the detectors, and everything about them in one document."""
    work = Work(job, detectors, data, recipe)
    if recipe.detector != "retinanet":
        return compare(work, [], [f"{recipe.detector} has no fixed graph: it is not exported, and not timed."])
    built, notes = engines(work)
    return compare(work, built, notes)
