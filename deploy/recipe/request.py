"""From the recipe that was given to the one that is run: what depends on the model and the data is filled in."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from upvits.calib_data import DataSource
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.recipe.detect import resolved as resolved_detection
from upvits.deploy.recipe.document import Recipe
from upvits.toolchain.training.settings import DistillSettings, settings_for


def run_name(recipe: Recipe) -> str:
    """Default name of the run's directory, e.g. `pvt_v2_b0-r0.50`."""
    plan = recipe.plan
    if plan.like is not None:
        cut = f"like-{plan.like}"
    elif plan.latency is not None:
        cut = plan.latency.spelling.replace(" ", "")
    elif plan.target_macs is not None:
        cut = f"macs{plan.target_macs:.2f}"
    elif plan.target_params is not None:
        cut = f"params{plan.target_params:.2f}"
    else:
        cut = f"r{plan.ratio or 0:.2f}"
    depth = "" if plan.depth_ratio is None else f"-d{plan.depth_ratio:.2f}"
    planner = f"-{plan.planner}" if plan.planner == "global" else ""
    return f"{recipe.model}-{cut}{depth}{planner}"


def resolve(recipe: Recipe, model: nn.Module, source: DataSource, device: torch.device) -> Recipe:
    """Fill in what depends on the model and the data. Fine-tuning gets `settings_for` where the recipe says nothing."""
    images = len(source.train)
    demo = source.spec == "demo"
    suited = asdict(settings_for(model, source, compensated=recipe.compensate.enabled is not False))
    # on CPUs, reading processes would take the cores that train
    suited["workers"] = min(8, usable_cores() - 1) if device.type == "cuda" and not demo else 0
    distill = recipe.distill.model_copy(update={name: suited[name] for name, value in recipe.distill if value is None})
    score = recipe.score.model_copy(
        update={"num_images": min(recipe.score.num_images or (256 if demo else 1024), images)}
    )
    compensate = recipe.compensate.model_copy(
        update={"refit_images": min(recipe.compensate.refit_images or 512, images)}
    )
    detect = None if recipe.detect is None else resolved_detection(recipe.detect)
    return recipe.model_copy(update={"distill": distill, "score": score, "compensate": compensate, "detect": detect})


def distill_settings(recipe: Recipe) -> DistillSettings:
    """The distillation of a resolved recipe."""
    return DistillSettings(**recipe.distill.model_dump(), seed=recipe.seed)
