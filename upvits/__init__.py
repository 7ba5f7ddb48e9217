"""Make a trained vision transformer smaller, build an engine from it, and prove that it is faster and still right.

`build` runs the whole job of the command line. The steps by themselves, chained in memory:

    import upvits

    model = upvits.create_model("pvtv2_b0", weights="demo")
    data = upvits.open_data("demo")
    images = upvits.calibration_images(model, data)

    scores = upvits.score(model, images)
    plan = upvits.plan(model, scores, ratio=0.5)
    small = upvits.prune(model, plan, images)
    tuned = upvits.distill(small, model, data).model

    print(upvits.accuracy(tuned, data).top1)
    upvits.save(tuned, "small")
    upvits.export(tuned, "small.onnx")
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from upvits.calib_data.lazy import lazy_names

if TYPE_CHECKING:
    from upvits.calib_data.errors import UserError
    from upvits.calib_data.sources import open_data
    from upvits.deploy.graphs.export import export
    from upvits.deploy.handover.package import package
    from upvits.deploy.pipeline import build
    from upvits.toolchain.networks.models import create_model, load, save
    from upvits.toolchain.planning import PruningPlan
    from upvits.toolchain.scores import Scores, score
    from upvits.toolchain.steps import accuracy, calibration_images, plan, prune
    from upvits.toolchain.structure.macs import count_macs, count_params
    from upvits.toolchain.training.distillation import distill
    from upvits.toolchain.training.settings import DistillSettings

__all__ = [
    "DistillSettings",
    "PruningPlan",
    "Scores",
    "UserError",
    "accuracy",
    "build",
    "calibration_images",
    "count_macs",
    "count_params",
    "create_model",
    "distill",
    "export",
    "load",
    "open_data",
    "package",
    "plan",
    "prune",
    "save",
    "score",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a program shows our messages, or does not

if not TYPE_CHECKING:  # a type checker then knows which names there are
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "calib_data.errors": ("UserError",),
            "calib_data.sources": ("open_data",),
            "deploy.graphs.export": ("export",),
            "deploy.handover.package": ("package",),
            "deploy.pipeline": ("build",),
            "toolchain.networks.models": ("create_model", "load", "save"),
            "toolchain.planning": ("PruningPlan",),
            "toolchain.scores": ("Scores", "score"),
            "toolchain.steps": ("accuracy", "calibration_images", "plan", "prune"),
            "toolchain.structure.macs": ("count_macs", "count_params"),
            "toolchain.training.distillation": ("distill",),
            "toolchain.training.settings": ("DistillSettings",),
        },
    )
