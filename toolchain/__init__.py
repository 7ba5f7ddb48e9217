"""Make it small: families, scores, plan, surgery and distillation of vision transformers. PyTorch only.

model = toolchain.load("my-model/")
scores = toolchain.score(model, images)
small = toolchain.prune(model, toolchain.plan(model, scores, ratio=0.5))
toolchain.save(small, "my-small-model/")
"""

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
