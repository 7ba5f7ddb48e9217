"""The main job, on one screen: from a trained vision transformer to a smaller one that is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upvits import toolchain
from upvits.calib_data.errors import TargetError, UserError
from upvits.deploy.detectors.compare import detection_report
from upvits.deploy.detectors.flow import compared, detectors_of
from upvits.deploy.recipe.document import IDENTITY, Recipe, make_recipe
from upvits.deploy.recipe.request import Job, resolve
from upvits.deploy.report.document import Report
from upvits.deploy.report.views import save_report
from upvits.deploy.speed.search import LatencyRecord
from upvits.deploy.stages.bench import bench
from upvits.deploy.stages.dense import judge_dense
from upvits.deploy.stages.distill import distill
from upvits.deploy.stages.engines import build_engines
from upvits.deploy.stages.export import export
from upvits.deploy.stages.precision import convert_graphs
from upvits.deploy.stages.prune import choose_plan, compensation_images, prune
from upvits.deploy.stages.score import score, scores_of
from upvits.deploy.stages.summary import Artifacts, summarise
from upvits.deploy.stages.together import together
from upvits.deploy.store.disk import disk_errors
from upvits.deploy.store.drafts import remove_work_folders
from upvits.deploy.store.run_dir import open_run

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
    recipe = recipe if isinstance(recipe, Recipe) else make_recipe(recipe)
    job = resolve(recipe, None if out is None else Path(out), quiet=quiet)
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
        assert done.tuned is not None
        report = summarise(job, done, detection_report(job, done.tuned, done.detected))
        with disk_errors(job.folder, "report"):
            save_report(job.folder, report)
        remove_work_folders(job.folder)
    return report


def require_target(report: Report) -> None:
    """A missed latency ends a run, once its whole report is written.

    Raises:
        TargetError: the finished engine is more than 5 % slower than asked for.
    """
    target = report.target
    if target is None or target.met or target.measured is None:
        return
    measured, before = target.measured, target.searched
    raise TargetError(
        f"{target.asked} was asked for on {target.runtime} {target.precision} at batch {target.batch}; the finished "
        f"engine takes {measured.ms:.3g} ms and the dense one {measured.dense_ms:.3g} ms, {measured.speedup:.2f}x "
        f"({measured.low:.2f} to {measured.high:.2f} over rounds).",
        why=f"When the plan was chosen: {before.ms:.3g} ms against {before.dense_ms:.3g} ms, {before.speedup:.2f}x.",
        fix="If the machine was busy, the same command with more --bench-seconds measures again; otherwise ask for a "
        "little less in a new run.",
    )


def preview(recipe: Recipe, *, quiet: bool = True) -> tuple[toolchain.PruningPlan, LatencyRecord | None]:
    """What a recipe would cut, and how a latency was met where one is asked for; nothing is written.

    Uniform widths depend on the request alone. The other planners weigh scores, which are then measured (and, for a
    latency, networks are built and timed).
    """
    job = resolve(recipe, quiet=quiet)
    if job.first_plan is not None:
        return job.first_plan, None
    images = compensation_images(job) if job.recipe.plan.planner != "uniform" else None
    return choose_plan(job, together(job, scores_of), images)


def run_stages(job: Job, until: str) -> Artifacts:
    """The stages in order, each run or found whole, up to the one named `until`."""
    judged = judge_dense(job)
    scored = score(job)
    if until == "score":
        return Artifacts(judged, scored)
    pruned = prune(job, judged, scored)
    if until == "prune":
        return Artifacts(judged, scored, pruned)
    tuned = distill(job, judged, pruned)
    if until == "distill":
        return Artifacts(judged, scored, pruned, tuned)
    exported = export(job, pruned, tuned)
    if until == "export":
        return Artifacts(judged, scored, pruned, tuned, exported)
    graphs = convert_graphs(job, exported)
    if until == "precision":
        return Artifacts(judged, scored, pruned, tuned, exported, graphs)
    engines = build_engines(job, exported, graphs)
    if until == "engine":
        return Artifacts(judged, scored, pruned, tuned, exported, graphs, engines)
    benched = bench(job, pruned, exported, engines.artifacts)
    detected = None
    if job.coco is not None and job.recipe.detect is not None:
        detectors = detectors_of(job, tuned, job.coco, job.recipe.detect)
        detected = compared(job, detectors, job.coco, job.recipe.detect)
    return Artifacts(judged, scored, pruned, tuned, exported, graphs, engines, benched, detected)
