"""1-score: the importance of every unit."""

from __future__ import annotations

from upvits import toolchain
from upvits.calib_data import proxy_images
from upvits.deploy.recipe.request import Job
from upvits.deploy.stages.job import (
    stage,
)
from upvits.deploy.stages.together import together
from upvits.deploy.store.artifacts import Artifact
from upvits.toolchain.scores import Scores


def score(job: Job) -> Artifact:
    """1-score: the importance of every unit of the dense network."""
    settings = {
        **job.recipe.score.model_dump(),
        "seed": job.recipe.seed,
        "depth": job.may_shorten,
    }
    if job.recipe.score.method == "refined":  # measures around the cut, so the cut decides the result
        settings["cuts"] = job.recipe.plan.model_dump()
    return stage(job, "1-score", settings, job.inputs, lambda folder: together(job, scores_of).save(folder))


def scores_of(job: Job) -> Scores:
    """Measure them; nothing is written, and processes share the images."""
    recipe = job.recipe.score
    needs_images = job.may_shorten or recipe.method not in ("magnitude", "random")
    return toolchain.score(
        job.dense,
        proxy_images(job.source, job.preprocess, recipe.num_images or 1, job.recipe.seed) if needs_images else None,
        method=recipe.method,
        cuts=None if job.first_plan is None else job.first_plan.widths,
        depth=job.may_shorten,
        batch_size=recipe.batch_size,
        seed=job.recipe.seed,
        quiet=job.quiet,
    )
