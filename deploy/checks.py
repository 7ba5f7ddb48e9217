"""Checks of a request as a whole, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

import toolchain
from calib_data import DataSource, demo_weights
from calib_data.errors import UserError
from deploy.recipe import EngineRecipe, Recipe
from deploy.runtimes import BatchProfile, Runtime
from deploy.stages import precisions_for
from toolchain.models import label_names_of
from toolchain.names import canonical_name
from toolchain.planning import check_request
from toolchain.timm_config import num_classes_of

CUTS = ("ratio", "target_macs", "target_params", "like")


def with_names(recipe: Recipe) -> Recipe:
    """The recipe with timm's model names, absolute paths, and weights chosen.

    Raises:
        UserError: a name is unknown, no cut or several cuts are asked for, or there are no weights to start from.
    """
    plan = recipe.plan
    wanted = {
        "ratio": plan.ratio,
        "target-macs": plan.target_macs,
        "target-params": plan.target_params,
        "like": plan.like,
    }
    given = [name for name, value in wanted.items() if value is not None]
    if len(given) != 1:
        raise UserError(
            f"How much is to be cut? {'Nothing was given' if not given else 'Given were ' + ' and '.join(given)}.",
            fix="Give exactly one of --ratio, --target-macs, --target-params and --like.",
        )
    if plan.like is None:
        check_request({given[0]: getattr(plan, given[0])}, plan.align, plan.components)
    model = canonical_name(recipe.model)
    if plan.like is not None:
        plan = plan.model_copy(update={"like": canonical_name(plan.like)})
    weights = recipe.weights or _default_weights(model, recipe.data)
    if weights not in ("demo", "timm", "random"):
        weights = str(Path(weights).expanduser().absolute())
    return recipe.model_copy(
        update={"model": model, "weights": weights, "data": _absolute_data(recipe.data), "plan": plan}
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


def check_engine_request(recipe: EngineRecipe, runtimes: Sequence[Runtime]) -> None:
    """Refuse batch profiles and precisions that no chosen runtime can build.

    Raises:
        UserError: the profile is not min:opt:max, or a precision is unknown.
    """
    parts = recipe.batch.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise UserError(f"Batch profile {recipe.batch!r} is not valid.", fix="Give it as min:opt:max, e.g. 1:8:32.")
    BatchProfile(*(int(part) for part in parts))
    known = {name for runtime in runtimes for name in runtime.precisions}
    choices = f"Choose from {', '.join(sorted(known))} or auto."
    unknown = [name for name in recipe.precision.split(",") if name not in known | {"auto"}]
    if unknown:
        raise UserError(
            f"Unknown precision {', '.join(unknown)}.", fix=f"Choose from {', '.join(sorted(known))} or auto."
        )
    if not any(precisions_for(runtime, recipe.precision) for runtime in runtimes):
        raise UserError("No chosen runtime has this precision.", fix=choices)


def like_model(recipe: Recipe, dense: nn.Module, image_size: int) -> nn.Module | None:
    """The published model whose widths are wanted, or None."""
    if recipe.plan.like is None:
        return None
    return toolchain.create_model(
        recipe.plan.like, weights="random", num_classes=num_classes_of(dense), image_size=image_size
    )
