"""2-prune: the plan, the network that it leaves, and what that costs before any training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from upvits import toolchain
from upvits.calib_data import PreparedImages, proxy_images
from upvits.deploy.recipe.request import Job, plan_arguments
from upvits.deploy.report.verdict import small_proxy
from upvits.deploy.speed.search import FittedPlan, LatencyRecord, search
from upvits.deploy.stages.dense import accuracy_of_dense, predictions_of_dense
from upvits.deploy.stages.documents import CompensationRecord, PrunedAccuracies
from upvits.deploy.stages.job import accuracy_of, accuracy_record, stage
from upvits.deploy.stages.steadiness import unsteady
from upvits.deploy.stages.together import together
from upvits.deploy.store.artifacts import Artifact, atomic_write
from upvits.deploy.store.documents import save_document
from upvits.toolchain.compensation import TooFewImagesError, compensated_curves, compress, with_joint_units
from upvits.toolchain.planning import Curve, PruningPlan, plan_within
from upvits.toolchain.planning.costs import Costs
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores import Scores
from upvits.toolchain.steps import CURVE_IMAGES, units_by_joint_loss, weighed_losses, with_units_for_refit
from upvits.toolchain.surgery.rounds import plan_in_rounds

_LOGGER = logging.getLogger(__name__)

Losses = Mapping[str, Curve]
"""Expected losses by group."""


def prune(job: Job, judged: Artifact, scored: Artifact) -> Artifact:
    """The stage."""

    def work(folder: Path) -> None:
        scores = Scores.load(scored.folder)
        plan, target = None, None
        if _alone(job):
            plan, target = choose_plan(job, scores, compensation_images(job))
        if target is not None:
            atomic_write(folder / "target.json", target.model_dump_json(indent=2).encode())
        plan, compensated, record = together(job, _cut, scores, plan)
        (folder / "plan.json").write_text(plan.to_json())
        deleted = toolchain.delete_units(job.dense, plan)
        save_document(folder / "compensation.json", record)
        toolchain.save(compensated or deleted, folder / "model")
        _warn_of_small_proxy(job, plan, scores, record.rotated)
        reference = predictions_of_dense(judged)
        after_prune = accuracy_of(job, compensated or deleted, reference)
        after_deletion = None if compensated is None else accuracy_of(job, deleted, reference)
        accuracies = PrunedAccuracies(
            dense=accuracy_of_dense(judged),
            after_prune=accuracy_record(after_prune),
            after_deletion=None if after_deletion is None else accuracy_record(after_deletion),
        )
        save_document(folder / "accuracy.json", accuracies)

    where = {} if job.deployment is None else job.deployment.facts()  # a latency depends on the machine too
    settings = {**job.recipe.plan.model_dump(), **job.recipe.compensate.model_dump(), "seed": job.recipe.seed}
    return stage(
        job, "2-prune", settings, {**job.inputs, "judged": judged.digest, "scores": scored.digest, **where}, work
    )


def _alone(job: Job) -> bool:
    """Whether the first process chooses the plan without the others: it times engines, or scores again in between."""
    return job.recipe.plan.planner == "latency" or job.recipe.plan.rounds > 1


def _cut(
    job: Job, scores: Scores, plan: PruningPlan | None
) -> tuple[PruningPlan, nn.Module | None, CompensationRecord]:
    """The plan, which is chosen here where there is none yet, and the network that it leaves. Processes share it."""
    images = compensation_images(job)
    if plan is None:
        plan, _ = choose_plan(job, scores, images)
    if images is not None:
        with suppress(TooFewImagesError):  # `compress` says so, or refuses
            plan = with_units_for_refit(job.dense, plan, images, seed=job.recipe.seed, quiet=job.quiet)
    chosen = plan
    plan = shared().from_leader(lambda: chosen)
    return plan, *_compensated(job, plan, images)


def _compensated(
    job: Job, plan: PruningPlan, images: PreparedImages | None
) -> tuple[nn.Module | None, CompensationRecord]:
    """The network rotated, cut and refitted, and the record of it.

    There is no network where compensation is switched off (no images), nor where the images are too few and the recipe
    does not insist on it.
    """
    if images is None:
        return None, CompensationRecord(left_out="it was switched off (--no-compensate).")
    try:
        compressed = compress(job.dense, plan, images, quiet=job.quiet)
    except TooFewImagesError as error:
        if job.recipe.compensate.enabled:
            raise
        _say([f"left out. {error.what} {error.fix}"])
        return None, CompensationRecord(left_out=f"{error.what} {error.fix}")
    _say(compressed.report.warnings)
    return compressed.model, CompensationRecord(report=compressed.report)


def _say(warnings: Sequence[str]) -> None:
    """Name what compensation could not do; all of it is in compensation.json."""
    if warnings:
        more = f" (and {len(warnings) - 3} more)" if len(warnings) > 3 else ""
        _LOGGER.warning("Compensation: %s%s", "; ".join(warnings[:3]), more)


def _warn_of_small_proxy(job: Job, plan: PruningPlan, scores: Scores, rotated: Sequence[str]) -> None:
    groups = unsteady(plan, scores, job.dense, rotated)
    if groups:
        worst = next(iter(groups))
        _LOGGER.warning("%s", small_proxy(len(groups), worst, groups[worst].overlap))


def choose_plan(job: Job, scores: Scores, images: PreparedImages | None) -> tuple[PruningPlan, LatencyRecord | None]:
    """The plan that a job asks for; where it asks for a latency, also how that was met."""
    if job.recipe.plan.planner == "latency":
        result = _latency_plan(job, scores, images)
        plan, record = result.plan, result.record
        asked: dict[str, float | int | str] = {
            "latency": record.asked,
            "runtime": record.runtime,
            "batch": record.batch,
        }
        return replace(plan, planner="latency", asked={**asked, **plan.asked}), record
    if job.recipe.plan.rounds > 1:
        return _plan_in_rounds(job, scores), None
    try:
        return make_plan(job, scores, images), None
    except TooFewImagesError:  # `compress` says so, or refuses
        return make_plan(job, scores), None


def compensation_images(job: Job) -> PreparedImages | None:
    """Training images that compensation is fitted on; None when it is switched off."""
    recipe = job.recipe.compensate
    if recipe.enabled is False:
        return None
    return proxy_images(job.source, job.preprocess, recipe.refit_images or 1, job.recipe.seed)


def make_plan(job: Job, scores: Scores, images: PreparedImages | None = None) -> PruningPlan:
    """The plan that a job asks for, unless it asks for a latency or for rounds."""
    arguments = plan_arguments(job.recipe.plan, job.preprocess)
    return toolchain.plan(
        job.dense, scores, like=job.like, images=images, seed=job.recipe.seed, quiet=job.quiet, **arguments
    )


def _expected_losses(job: Job, images: PreparedImages | None) -> Losses | None:
    """What a latency plan weighs groups by: losses after compensation; None where that is off or images are too few."""
    if images is None:
        return None
    try:
        return compensated_curves(job.dense, images[:CURVE_IMAGES], seed=job.recipe.seed, quiet=job.quiet)
    except TooFewImagesError:  # `compress` says so, or refuses
        return None


def _plan_in_rounds(job: Job, scores: Scores) -> PruningPlan:
    score = job.recipe.score
    images = proxy_images(job.source, job.preprocess, score.num_images or 1, job.recipe.seed)

    def score_again(network: nn.Module, widths: toolchain.Widths | None) -> Scores:
        if network is job.dense:
            return scores
        return toolchain.score(
            network,
            images,
            method=score.method,
            cuts=widths,
            depth="depth" in (job.recipe.plan.components or ()),
            batch_size=score.batch_size,
            seed=job.recipe.seed,
            quiet=job.quiet,
        )

    return plan_in_rounds(
        job.dense,
        score_again,
        job.recipe.plan.rounds,
        **plan_arguments(job.recipe.plan, job.preprocess),
    )


def _latency_plan(job: Job, scores: Scores, images: PreparedImages | None) -> FittedPlan:
    """Widths that meet the latency target, found with a table of this machine and checked on a network that was built.

    Raises:
        TargetError: none does.
    """
    recipe = job.recipe.plan
    assert recipe.latency is not None
    assert job.deployment is not None

    def plan_by(costs: Costs, budget: float, losses: Losses | None) -> PruningPlan:
        return plan_within(
            job.dense,
            scores,
            costs,
            budget,
            components=recipe.components or (),
            align=recipe.align,
            curves=losses,
            input_size=job.preprocess.input_size,
        )

    curves = _expected_losses(job, images)
    weighed: list[Losses | None] = []  # by the first budget, which is about the last one

    def planner(costs: Costs, budget: float) -> PruningPlan:
        if not weighed:
            by = partial(plan_by, costs, budget)
            if images is None or curves is None:
                weighed.append(None)
            else:
                weighed.append(weighed_losses(job.dense, images, curves, by, quiet=job.quiet))
        return plan_by(costs, budget, weighed[0])

    result = search(
        copy.deepcopy(job.dense).cpu(),
        job.preprocess,
        planner,
        job.deployment,
        recipe.latency,
        align=recipe.align,
        quiet=job.quiet,
    )
    if curves is None or not units_by_joint_loss(result.plan):
        return result
    return replace(result, plan=with_joint_units(result.plan, curves))
