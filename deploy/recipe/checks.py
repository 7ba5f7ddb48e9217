"""Checks of a request as a whole, before anything is computed or written."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from upvits import toolchain
from upvits.calib_data import DataSource, Preprocess, demo_weights, proxy_images
from upvits.calib_data.errors import UserError
from upvits.deploy.choices import PRECISIONS
from upvits.deploy.recipe.document import CUTS, PlanRecipe, Recipe
from upvits.deploy.runtimes import Runtime
from upvits.deploy.stages.precision import precisions_for
from upvits.toolchain.compensation import MIN_IMAGES
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.networks.names import canonical_name
from upvits.toolchain.planning import DEFAULT_COMPONENTS, Component, check_request
from upvits.toolchain.structure.timm_config import num_classes_of

_LOGGER = logging.getLogger(__name__)

LATENCY = ("target_latency", "speedup")
NUMBERS = ("ratio", "target_macs", "target_params")


def with_names(recipe: Recipe) -> Recipe:
    """The recipe with timm's model names, absolute paths, and weights chosen.

    Raises:
        UserError: a name is unknown, no cut or several cuts are asked for, or there are no weights to start from.
    """
    plan = with_planner(recipe.plan)
    model = canonical_name(recipe.model)
    if plan.like is not None:
        plan = plan.model_copy(update={"like": canonical_name(plan.like)})
    weights = recipe.weights or _default_weights(model, recipe.data)
    if weights not in ("demo", "timm", "random"):
        weights = str(Path(weights).expanduser().absolute())
    calib = recipe.precision.calib
    precision = recipe.precision.model_copy(update={"calib": calib and _absolute_data(calib)})
    named = recipe.model_copy(
        update={
            "model": model,
            "weights": weights,
            "data": _absolute_data(recipe.data),
            "plan": plan,
            "precision": precision,
        }
    )
    check_weighing(named)
    return named


def with_planner(plan: PlanRecipe) -> PlanRecipe:
    """The plan's part of a recipe with its planner chosen and its request checked.

    Raises:
        UserError: no cut or several cuts are asked for, or they do not go with the planner.
    """
    given = [name for name in CUTS if getattr(plan, name) is not None]
    if not given and plan.depth_ratio:
        plan, given = plan.model_copy(update={"ratio": 0.0}), ["ratio"]
    if len(given) != 1:
        raise UserError(
            f"How much is to be cut? {'Nothing was given' if not given else 'Given were ' + ' and '.join(given)}.",
            fix="Give exactly one of --ratio, --target-macs, --target-params, --like, --target-latency and --speedup.",
        )
    planner = plan.planner or ("latency" if given[0] in LATENCY else "uniform")
    if (planner == "latency") != (given[0] in LATENCY):
        raise UserError(
            f"The {planner} planner cannot aim at {given[0].replace('_', ' ')}.",
            why="It spends milliseconds." if planner == "latency" else "Only the latency planner measures them.",
            fix="Give --target-latency or --speedup with --planner latency, and any other cut with uniform or global.",
        )
    if planner != "uniform" and (plan.like is not None or plan.depth_ratio is not None):
        raise UserError(
            f"The {planner} planner chooses widths and depth itself.",
            fix="Leave --like and --depth-ratio out, or use --planner uniform.",
        )
    if plan.like is not None and plan.components is not None and not _whole_networks(plan.components):
        raise UserError(
            f"--like takes a whole network over, not only {', '.join(plan.components)}.",
            fix="Leave --components out, or name embed, ffn and one of attention, heads and qk_v.",
        )
    if plan.rounds > 1 and (plan.like is not None or planner == "latency"):
        raise UserError(
            "Rounds need a cut that can be made in steps.",
            fix="Use --rounds with --ratio, --target-macs or --target-params.",
        )
    depth: tuple[Component, ...] = () if planner == "uniform" else ("depth",)
    components = (*DEFAULT_COMPONENTS, *depth) if plan.components is None else plan.components
    numbers = {given[0]: getattr(plan, given[0])} if given[0] in NUMBERS else {}
    check_request(numbers, plan.align, components, "uniform" if planner == "uniform" else "global")
    return plan.model_copy(update={"planner": planner, "components": components})


def _whole_networks(components: Collection[Component]) -> bool:
    return {"embed", "ffn"} < {*components} and bool({"attention", "heads", "qk_v"} & {*components})


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
    wanted, there = recipe.compensate.refit_images, len(source.train)
    short = None
    if wanted is not None and wanted < min(MIN_IMAGES, there):
        short = f"--refit-images {wanted} is too few."
    elif recipe.compensate.enabled and there < MIN_IMAGES:
        short = f"{there} training images are too few for --compensate."
    if short is not None:
        raise UserError(
            short,
            why="Layers are refitted on them, and every fifth is held out to check the result.",
            fix=f"Give at least {MIN_IMAGES} (500 are a good number), or --no-compensate.",
        )


def _default_weights(model: str, data: str) -> str:
    if data == "demo" and demo_weights(model) is not None:
        return "demo"
    raise UserError(
        f"Which weights of {model}?",
        why="Pruning needs a network that was trained on your data; only pvtv2_b0 with the demo data comes along.",
        fix="Give --weights FILE (a checkpoint in timm's naming), --weights timm (pretrained, from the hub), or "
        "--weights random to look at sizes and speed only.",
    )


def _absolute_data(spec: str) -> str:
    kind, colon, path = spec.partition(":")
    return f"{kind}:{Path(path).expanduser().absolute()}" if kind == "imagefolder" and colon else spec


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
            fix=f"Give weights that were trained on {recipe.data}, or with --data the data of these weights.",
        )
    names = label_names_of(model)
    if names is not None and names != source.class_names:
        differing = next((a, b) for a, b in zip(names, source.class_names, strict=True) if a != b)
        raise UserError(
            f"The classes of weights and data differ, e.g. {differing[0]!r} and {differing[1]!r} in the same place.",
            why="Accuracy would be measured against the wrong labels.",
            fix="Rename the class folders, or give the data that the weights were trained on.",
        )


def check_engine_request(recipe: Recipe, runtimes: Sequence[Runtime]) -> None:
    """Refuse batch profiles, precisions and targets that no chosen runtime can build.

    Raises:
        UserError: the profile leaves out a batch that is to be timed, or no runtime has a precision or a target.
    """
    wanted, profile = recipe.engine, recipe.engine.batch
    outside = [batch for batch in recipe.bench.batches if not profile.min <= batch <= profile.max]
    if outside and any(runtime.has_batch_profile for runtime in runtimes):
        raise UserError(
            f"Batch {outside[0]} is to be timed, but engines are built for {profile.min} to {profile.max}.",
            fix="Widen --batch-profile, or time other batches with --bench-batches.",
        )
    check_precision(wanted.precision, runtimes)
    if wanted.targets and not any(runtime.has_targets for runtime in runtimes):
        raise UserError(
            "--targets means nothing to the chosen runtimes.",
            why=f"{', '.join(runtime.name for runtime in runtimes)} build for the machine that they run on.",
            fix="Leave the targets out, or add tensorrt-rtx to --runtime.",
        )
    for runtime in runtimes:
        for precision in precisions_for(runtime, wanted.precision):
            runtime.targets_for(precision, wanted.targets if runtime.has_targets else ())


def check_precision(precisions: Sequence[str], runtimes: Sequence[Runtime]) -> None:
    """Refuse precisions that no chosen runtime has.

    Raises:
        UserError: names the precision, and those to choose from.
    """
    for name in precisions:
        if not any(precisions_for(runtime, (name,)) for runtime in runtimes):
            having = {p for runtime in runtimes for p in runtime.precisions}
            raise UserError(
                f"No chosen runtime has {name}.",
                why=f"The runtimes are {', '.join(runtime.name for runtime in runtimes)}.",
                fix=f"Choose from {', '.join(p for p in PRECISIONS if p in having)}, or another --runtime.",
            )


def check_forward(model: nn.Module, source: DataSource, preprocess: Preprocess) -> None:
    """Run the network on a few images.

    Raises:
        UserError: it cannot take images of this size, or gives NaN.
    """
    images = proxy_images(source, preprocess, 4, seed=0)
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


def warn_of_skipped(source: DataSource) -> None:
    """Name the unreadable images that were left out."""
    names = ", ".join(source.skipped[:5]) + (", ..." if len(source.skipped) > 5 else "")
    _LOGGER.warning("%d unreadable images were skipped: %s", len(source.skipped), names)


def like_model(recipe: Recipe, dense: nn.Module, image_size: int) -> nn.Module | None:
    """The published model whose widths are wanted, or None."""
    if recipe.plan.like is None:
        return None
    return toolchain.create_model(
        recipe.plan.like, weights="random", num_classes=num_classes_of(dense), image_size=image_size
    )
