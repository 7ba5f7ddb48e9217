"""What detectors learn from, and what they need to be there."""

from __future__ import annotations

import importlib.util

import torch

from upvits.calib_data.cache import cache_folder
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.scenes import demo_scenes
from upvits.deploy.recipe.detect import DetectRecipe, places_of
from upvits.deploy.store.disk import disk_errors
from upvits.detection import openmm
from upvits.detection.coco import CocoData, open_coco


def open_detection_data(coco: str, detector: str = "retinanet", *, quiet: bool) -> CocoData:
    """The data set that a spec names: a folder, one or two files of annotations, or `demo`.

    Raises:
        UserError: the folder holds no data set, or its boxes lack the masks that the detector learns.
    """
    cache = cache_folder()
    with disk_errors(cache, "data"):
        places = [demo_scenes(cache, quiet=quiet)] if coco == "demo" else places_of(coco)
        files = places[0].suffix.lower() == ".json" and not places[0].is_dir()
        data = open_coco((places[0], places[-1]) if files else places[0], cache)
    if detector == "mask-rcnn":
        data.require_masks()
    return data


def check_detection(recipe: DetectRecipe) -> None:
    """Refuse, before anything is read, what this machine cannot do.

    Raises:
        UserError: mixed precision without a GPU.
        MissingDependencyError: mmdet, or TensorBoard where it is asked for, is not installed.
    """
    openmm.require()
    if recipe.amp and not torch.cuda.is_available():
        raise UserError("--amp needs an NVIDIA GPU.", fix="Leave it out: on CPUs training runs in fp32.")
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingDependencyError("--tensorboard needs TensorBoard.", fix="Run: pip install tensorboard")
