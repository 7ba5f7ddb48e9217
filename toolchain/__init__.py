"""Make it small: families, scores, plan, surgery and distillation of vision transformers. PyTorch only.

model = toolchain.load("my-model/")
scores = toolchain.score(model, images)
small = toolchain.prune(model, toolchain.plan(model, scores, ratio=0.5))
toolchain.save(small, "my-small-model/")
"""

from toolchain.distillation import DistillSettings, distill
from toolchain.groups import ChannelGroup, Widths
from toolchain.macs import count_macs, count_params
from toolchain.models import create_model, load, preprocess_of, save
from toolchain.planning import PruningPlan, plan
from toolchain.scores import Scores, score
from toolchain.surgery import prune

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
