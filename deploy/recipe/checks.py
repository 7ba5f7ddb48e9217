"""Refusals: what a request would fail on, said before anything is computed or written."""

from __future__ import annotations

import re

import torch
from torch import nn

from upvits.calib_data import DataSource, Preprocess, proxy_images
from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.document import Recipe
from upvits.toolchain.compensation import MIN_IMAGES
from upvits.toolchain.networks.models import label_names_of


def check_weighing(recipe: Recipe) -> None:
    """Refuse scores without a unit where nothing else tells how much each cut costs.

    Args:
        recipe: with its planner chosen.

    Raises:
        UserError: the planner cannot weigh groups against each other.
    """
    plan, method = recipe.plan, recipe.score.method
    weighed = recipe.compensate.enabled is not False and plan.rounds == 1 and "heads" not in (plan.components or ())
    if plan.planner != "uniform" and method in ("magnitude", "random") and not weighed:
        raise UserError(
            f"The {plan.planner} planner cannot weigh {method} scores of different groups against each other.",
            why="It needs to know how many nats of KL each unit costs.",
            fix="Score by fisher, refined or kl, or use the uniform planner.",
        )


def check_compensation(recipe: Recipe, source: DataSource) -> None:
    """Refuse compensation that was asked for by name where there are too few images for it.

    Raises:
        UserError: says how many training images it needs.
    """
    refit_images, available = recipe.compensate.refit_images, len(source.train)
    short = None
    if refit_images is not None and refit_images < min(MIN_IMAGES, available):
        short = f"--refit-images {refit_images} is too few."
    elif recipe.compensate.enabled and available < MIN_IMAGES:
        short = f"{available} training images are too few for --compensate."
    if short is not None:
        raise UserError(
            short,
            why="Layers are refitted on them, and every fifth is held out to check the result.",
            fix=f"Give at least {MIN_IMAGES} (500 are a good number), or --no-compensate.",
        )


def check_classes(model: nn.Module, source: DataSource, recipe: Recipe) -> None:
    """Refuse data whose classes are not the network's.

    Raises:
        UserError: their number or, where both are named, their names or order differ.
    """
    if source.class_names is None or model.num_classes == 0:
        return
    if len(source.class_names) != model.num_classes:
        raise UserError(
            f"The weights know {model.num_classes} classes, the data have {len(source.class_names)}.",
            why="Accuracy and labels would be meaningless.",
            fix=f"Give weights that were trained on {recipe.data}, or with --data the data of these weights. Where the "
            "data hold some of the network's classes only, number those with --class-map.",
        )
    names = label_names_of(model)
    settled = recipe.class_map is not None or recipe.class_order is not None
    placeholders = names is not None and all(re.fullmatch(r"(LABEL_|class )?\d+", name) for name in names)
    if not settled and not placeholders and names is not None and names != source.class_names:
        differing = next((a, b) for a, b in zip(names, source.class_names, strict=True) if a != b)
        raise UserError(
            f"The classes of weights and data differ, e.g. {differing[0]!r} and {differing[1]!r} in the same place.",
            why="Accuracy would be measured against the wrong labels.",
            fix="Rename the class folders, name their numbers with --class-map, or give the data that the weights were "
            "trained on.",
        )


def check_forward(model: nn.Module, source: DataSource, preprocess: Preprocess) -> None:
    """Run the network on a few images.

    Raises:
        UserError: it cannot take images of this size, or gives NaN.
    """
    images = proxy_images(source, preprocess, 4, seed=0).read()
    try:
        with torch.inference_mode():
            outputs = model(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = preprocess.input_size[1]
        raise UserError(
            f"The network cannot take images of {size} x {size} pixels ({str(error).splitlines()[0]}).",
            fix="Choose another --image-size: a multiple of 32 suits PVTv2, a multiple of the patch size ViTs.",
        ) from error
    if not torch.isfinite(outputs).all():
        raise UserError(
            "The network gives NaN or infinity on real images.",
            why="Nothing that is computed from them would mean anything.",
            fix="Check the weights and the normalisation of the images.",
        )
