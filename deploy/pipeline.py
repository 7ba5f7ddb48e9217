"""The main job, on one screen: from a trained vision transformer to a smaller one that is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upvits import toolchain
from upvits.calib_data import Preprocess, open_data
from upvits.calib_data.errors import TargetError, UserError
from upvits.deploy.detectors import flow
from upvits.deploy.recipe.checks import (
    check_classes,
    check_compensation,
    check_engine_request,
    check_forward,
    like_model,
    warn_of_skipped,
    with_names,
)
from upvits.deploy.recipe.document import IDENTITY, Recipe, make_recipe
from upvits.deploy.recipe.request import resolve, run_name
from upvits.deploy.report.document import Report
from upvits.deploy.report.views import save_report
from upvits.deploy.runtimes import resolve_runtimes
from upvits.deploy.speed.search import LatencyRecord
from upvits.deploy.speed.table import tables_folder
from upvits.deploy.stages import engines as engine_stages
from upvits.deploy.stages import network as stages
from upvits.deploy.stages import prune as prune_stage
from upvits.deploy.stages.job import Job
from upvits.deploy.stages.precision import precisions
from upvits.deploy.stages.summary import Artifacts, summarise
from upvits.deploy.store.artifacts import disk_errors
from upvits.deploy.store.run_dir import open_run
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.depth import last_blocks_first
from upvits.toolchain.training.processes import pick_device

STAGES = ("score", "prune", "distill", "export", "precision", "engine", "bench", "report")


def build(
    recipe: Recipe | dict[str, Any], out: Path | str | None = None, *, until: str = "report", quiet: bool = True
) -> Report | None:
    """Run the main job, or continue it: stages that are whole and still answer the recipe are skipped.

    Args:
        recipe: a recipe or its values; `{"model": "pvtv2_b0", "plan": {"ratio": 0.5}}` is enough.
        out: run directory; by default `runs/` and a name made of model and ratio.
        until: the last stage to run.
        quiet: no progress bars.

    Returns:
        The report, or None when the run ends at an earlier stage.

    Raises:
        UserError: something in the request, the weights or the data is wrong (see its exit code).
        TargetError: a latency was asked for and not met.

    Example:
        >>> import tempfile, upvits
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> recipe = {
        ...     "model": "pvtv2_b0",
        ...     "plan": {"ratio": 0.5},
        ...     "score": {"method": "magnitude"},
        ...     "compensate": {"enabled": False},
        ... }
        >>> upvits.build(recipe, folder, until="prune")
        >>> upvits.count_params(upvits.load(folder + "/2-prune/model"))
        871868
    """
    if until not in STAGES:
        raise UserError(f"Unknown stage {until!r}.", fix=f"Choose one of {', '.join(STAGES)}.")
    job = prepare(
        recipe if isinstance(recipe, Recipe) else make_recipe(recipe), None if out is None else Path(out), quiet=quiet
    )
    report = run_job(job, until)
    if report is not None:
        require_target(report)
    return report


def run_job(job: Job, until: str) -> Report | None:
    """Run the stages of a prepared job in its directory, which no other process can enter meanwhile."""
    with open_run(job.folder, job.recipe.model_dump(), IDENTITY):
        done = run_stages(job, until)
        if until != "report":
            return None
        report = summarise(job, done)
        with disk_errors(job.folder, "report"):
            save_report(job.folder, report)
    return report


def require_target(report: Report) -> None:
    """A missed latency ends a run, once its whole report is written.

    Raises:
        TargetError: the finished engine is more than 5 % slower than asked for.
    """
    target = report.target
    if target is None or target.met or target.measured is None:
        return
    found, before = target.measured, target.searched
    raise TargetError(
        f"{target.asked} was asked for on {target.runtime} {target.precision} at batch {target.batch}; the finished "
        f"engine takes {found.ms:.3g} ms and the dense one {found.dense_ms:.3g} ms, {found.speedup:.2f}x "
        f"({found.low:.2f} to {found.high:.2f} over rounds).",
        why=f"When the plan was chosen: {before.ms:.3g} ms against {before.dense_ms:.3g} ms, {before.speedup:.2f}x.",
        fix="If the machine was busy, the same command with more --bench-seconds measures again; otherwise ask for a "
        "little less in a new run.",
    )


def preview(recipe: Recipe, *, quiet: bool = True) -> tuple[toolchain.PruningPlan, LatencyRecord | None]:
    """What a recipe would cut, and how a latency was met where one is asked for; nothing is written.

    Uniform widths depend on the request alone. The other planners weigh scores, which are then measured (and, for a
    latency, networks are built and timed).
    """
    job = prepare(recipe, None, quiet=quiet)
    if job.first_plan is not None:
        return job.first_plan, None
    images = prune_stage.compensation_images(job) if job.recipe.plan.planner != "uniform" else None
    return prune_stage.choose_plan(job, stages.scores_of(job), images)


def run_stages(job: Job, until: str) -> Artifacts:
    """The stages in order, each run or found whole, up to the one named `until`."""
    scored = stages.score(job)
    if until == "score":
        return Artifacts(scored)
    pruned = prune_stage.prune(job, scored)
    if until == "prune":
        return Artifacts(scored, pruned)
    tuned = stages.distill(job, pruned)
    if until == "distill":
        return Artifacts(scored, pruned, tuned)
    exported = stages.export(job, pruned, tuned)
    if until == "export":
        return Artifacts(scored, pruned, tuned, exported)
    graphs = precisions(job, exported)
    if until == "precision":
        return Artifacts(scored, pruned, tuned, exported, graphs)
    engines = engine_stages.engines(job, exported, graphs)
    if until == "engine":
        return Artifacts(scored, pruned, tuned, exported, graphs, engines)
    benched = engine_stages.bench(job, pruned, exported, engines.artifacts)
    detected = None
    if job.coco is not None and job.recipe.detect is not None:
        detectors = flow.detectors_of(job, tuned, job.coco, job.recipe.detect)
        detected = flow.compared(job, detectors, job.coco, job.recipe.detect)
    return Artifacts(scored, pruned, tuned, exported, graphs, engines, benched, detected)


def prepare(recipe: Recipe, out: Path | None, *, quiet: bool) -> Job:
    """Load the network and the data, and check the whole request before anything is written.

    Raises:
        UserError: a part of the request cannot work, or the parts do not fit each other.
    """
    device = pick_device(recipe.device)
    recipe = with_names(recipe)
    coco = None
    if recipe.detect is not None:
        flow.check_request(recipe.detect)
        coco = flow.open_data(recipe.detect.coco, recipe.detect.detector, quiet=quiet)
    runtimes = resolve_runtimes(recipe.engine.runtime)
    check_engine_request(recipe, runtimes.runtimes)
    source = open_data(recipe.data, quiet=quiet)
    calib = recipe.precision.calib
    calibration = source if calib is None else open_data(calib, quiet=quiet)
    if source.skipped:
        warn_of_skipped(source)
    classes = len(source.class_names) if source.class_names and recipe.weights == "random" else None
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # decides random weights
        dense = toolchain.create_model(
            recipe.model, weights=str(recipe.weights), num_classes=classes, image_size=recipe.image_size
        )
    check_classes(dense, source, recipe)
    check_forward(dense, source, toolchain.preprocess_of(dense))
    recipe = resolve(recipe, dense, source, device)
    preprocess = toolchain.preprocess_of(dense)
    like = like_model(recipe, dense, preprocess.input_size[1])
    first = first_plan(recipe, dense, like, preprocess)
    check_compensation(recipe, source)
    if recipe.plan.planner == "latency":
        prune_stage.deployment_of(recipe, runtimes.runtimes)
        tables_folder()
    return Job(
        recipe=recipe,
        folder=(out or Path("runs") / run_name(recipe)).absolute(),
        dense=dense.to(device),
        like=like,
        first_plan=first,
        dense_digest=weights_digest(dense),
        source=source,
        calibration=calibration,
        preprocess=preprocess,
        runtimes=runtimes,
        quiet=quiet,
        coco=coco,
    )


def first_plan(
    recipe: Recipe, dense: nn.Module, like: nn.Module | None, preprocess: Preprocess
) -> toolchain.PruningPlan | None:
    """The plan by random scores: with the uniform planner its widths are those of any scores, so it tells now whether a
    request can be met. None where scores decide widths or which blocks leave.
    """
    if recipe.plan.planner != "uniform":
        return None
    scores = replace(toolchain.score(dense, method="random"), depth=last_blocks_first(dense))
    plan = prune_stage.make_plan(recipe, dense, like, scores, preprocess)
    return None if stages.may_shorten(recipe, dense, like) else plan
