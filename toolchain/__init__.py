"""Make it small: families, scores, plan, surgery and distillation of vision transformers. PyTorch only.

What users need of it is in `upvits`; here are the same steps, and the parts of the cut that tests and other rooms use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from upvits.calib_data.lazy import lazy_names

if TYPE_CHECKING:
    from upvits.toolchain.compensation import compress
    from upvits.toolchain.networks.models import create_model, load, preprocess_of, save
    from upvits.toolchain.planning import PruningPlan
    from upvits.toolchain.scores import Scores, score
    from upvits.toolchain.steps import accuracy, calibration_images, plan, prune
    from upvits.toolchain.structure.groups import ChannelGroup, Widths
    from upvits.toolchain.structure.macs import count_macs, count_params
    from upvits.toolchain.surgery.deletion import delete_units
    from upvits.toolchain.training.distillation import distill
    from upvits.toolchain.training.settings import DistillSettings

__all__ = [
    "ChannelGroup",
    "DistillSettings",
    "PruningPlan",
    "Scores",
    "Widths",
    "accuracy",
    "calibration_images",
    "compress",
    "count_macs",
    "count_params",
    "create_model",
    "delete_units",
    "distill",
    "load",
    "plan",
    "preprocess_of",
    "prune",
    "save",
    "score",
]

if not TYPE_CHECKING:  # a type checker then knows which names there are
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "compensation": ("compress",),
            "networks.models": ("create_model", "load", "preprocess_of", "save"),
            "planning": ("PruningPlan",),
            "scores": ("Scores", "score"),
            "steps": ("accuracy", "calibration_images", "plan", "prune"),
            "structure.groups": ("ChannelGroup", "Widths"),
            "structure.macs": ("count_macs", "count_params"),
            "surgery.deletion": ("delete_units",),
            "training.distillation": ("distill",),
            "training.settings": ("DistillSettings",),
        },
    )
