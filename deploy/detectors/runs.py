"""`upvits-deploy detect` on the networks of a run."""

from __future__ import annotations

from pathlib import Path

from upvits.calib_data.errors import UserError
from upvits.deploy.detectors.compare import read_comparison
from upvits.deploy.detectors.flow import compared, detectors_of, remembered
from upvits.deploy.recipe.detect import DetectRecipe
from upvits.deploy.recipe.detect_data import check_detection, open_detection_data
from upvits.deploy.recipe.document import IDENTITY, make_recipe
from upvits.deploy.recipe.request import resolve
from upvits.deploy.report.detection import DetectionReport
from upvits.deploy.report.document import REPORT, load_report
from upvits.deploy.report.views import save_report
from upvits.deploy.stages.documents import ModelName
from upvits.deploy.store.artifacts import Artifact, open_artifact
from upvits.deploy.store.disk import disk_errors
from upvits.deploy.store.run_dir import open_run, read_recipe


def detect_in_run(
    run: Path, recipe: DetectRecipe, *, engines: bool = True, quiet: bool = True
) -> tuple[dict[ModelName, Artifact], DetectionReport | None]:
    """Train detectors on a run's networks, or continue; then build, measure and compare them.

    All processes of a crew train; this one, the first, does everything else.

    Args:
        run: with a fine-tuned network.
        recipe: what is trained on what, and how; what is not given is as in the last training of this run.
        engines: build and compare engines too; otherwise detectors are only trained and judged.
        quiet: no progress.

    Returns:
        Artifacts of the detectors by backbone, and the comparison.

    Raises:
        UserError: the run has no fine-tuned network yet, or nothing can be learnt from the data.
        MissingDependencyError: mmdet is not installed.
    """
    recipe = remembered(run, recipe)
    check_detection(recipe)
    data = open_detection_data(recipe.coco, recipe.detector, quiet=quiet)
    tuned = open_artifact(run / "3-distill")
    if tuned is None:
        raise UserError(
            f"{run} has no fine-tuned network.",
            why="Detectors are trained on the dense and on the pruned network of a run.",
            fix=f"Run `upvits-deploy distill --recipe {run} --output {run}` first, or `build`.",
        )
    job = resolve(make_recipe(read_recipe(run)), run, quiet=quiet)
    with open_run(job.folder, job.recipe.model_dump(), IDENTITY):
        detectors = detectors_of(job, tuned, data, recipe)
        if not engines:
            return detectors, None
        report = read_comparison(compared(job, detectors, data, recipe))
    if (run / REPORT).exists():
        with disk_errors(run, "report"):
            save_report(run, load_report(run).model_copy(update={"detection": report}))
    return detectors, report
