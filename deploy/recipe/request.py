"""From the recipe that was given to the one that is run: what depends on the model and the data is filled in."""

from __future__ import annotations

import torch
from torch import nn

from upvits.calib_data import DataSource
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.recipe.detect import resolved as resolved_detection
from upvits.deploy.recipe.document import Recipe
from upvits.toolchain.families import FAMILIES, family_of
from upvits.toolchain.training.distillation import DistillSettings


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
    """Fill in what depends on the model and the data.

    PVTv2 learns from the dense parent's penultimate features too (weight 20), a ViT from its logits alone. Small data
    sets get small batches and larger steps, since they see few of them. The demo ends within minutes.
    """
    distill = recipe.distill
    images = len(source.train)
    demo = source.spec == "demo"
    small = images < 20_000
    # measured on the demo at ratio 0.5: compensated, 2 epochs at 3e-3 give 98.75 % (12e-3: 98.6 %); after plain
    # deletion, 3 epochs at 12e-3 give 98.1 %
    compensated = recipe.compensate.enabled is not False
    features = family_of(model) is FAMILIES["pvt_v2"] or model.num_classes == 0
    filled = {
        "epochs": (2 if compensated else 3) if demo else 30,
        "warmup_epochs": 0.3 if demo else 2.0,
        "batch_size": min(images, 32 if small else 256),
        "lr": (3e-3 if compensated else 12e-3) if demo else 4e-3 if small else 1e-3,
        # measured on the demo at 3 epochs: 98.1 % without CutMix, 96.7 % with it; long trainings want it
        "cutmix": 0.0 if demo else 0.5,
        "drop_path": 0.0 if small else 0.1,
        "feature_weight": 20.0 if features else 0.0,
        # on CPUs, reading processes would take the cores that train
        "workers": min(8, usable_cores() - 1) if device.type == "cuda" and not demo else 0,
    }
    distill = distill.model_copy(update={key: value for key, value in filled.items() if getattr(distill, key) is None})
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
