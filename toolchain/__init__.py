"""Make it small: families, scores, plan, surgery and distillation of vision transformers. PyTorch only.

model = toolchain.load("my-model/")
scores = toolchain.score(model, images)
small = toolchain.prune(model, toolchain.plan(model, scores, ratio=0.5))
toolchain.save(small, "my-small-model/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upvits.toolchain.networks.models import create_model, load, preprocess_of, save
    from upvits.toolchain.planning import PruningPlan, plan
    from upvits.toolchain.scores import Scores, score
    from upvits.toolchain.structure.groups import ChannelGroup, Widths
    from upvits.toolchain.structure.macs import count_macs, count_params
    from upvits.toolchain.surgery.prune import prune
    from upvits.toolchain.training.distillation import DistillSettings, distill

__all__ = [
    "ChannelGroup",
    "DistillSettings",
    "PruningPlan",
    "Scores",
    "Widths",
    "count_macs",
    "count_params",
    "create_model",
    "distill",
    "load",
    "plan",
    "preprocess_of",
    "prune",
    "save",
    "score",
]

_HOME = {
    "ChannelGroup": "structure.groups",
    "DistillSettings": "training.distillation",
    "PruningPlan": "planning",
    "Scores": "scores",
    "Widths": "structure.groups",
    "count_macs": "structure.macs",
    "count_params": "structure.macs",
    "create_model": "networks.models",
    "distill": "training.distillation",
    "load": "networks.models",
    "plan": "planning",
    "preprocess_of": "networks.models",
    "prune": "surgery.prune",
    "save": "networks.models",
    "score": "scores",
}


def __getattr__(name: str) -> object:
    # torch and timm take seconds to import; `toolchain.choices` is read by everything, `--help` and doctor too
    if name in _HOME:
        return getattr(import_module(f"upvits.toolchain.{_HOME[name]}"), name)
    raise AttributeError(f"module 'upvits.toolchain' has no attribute {name!r}")
