"""`distill --dry-run`: what the fine-tuning of a job will take here."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.request import Job, distill_settings
from upvits.deploy.stages.together import together
from upvits.toolchain.training.forecast import Forecast, forecast


def dry_run(job: Job) -> tuple[Forecast, str]:
    """The forecast, and whose widths it is for. Nothing is written.

    Raises:
        UserError: nothing would be trained.
    """
    if job.recipe.distill.finetuned is not None or not job.recipe.distill.epochs:
        raise UserError("Nothing would be trained.", fix="Leave out --finetuned, or give --epochs above 0.")
    student, whose = _student(job)
    found: Forecast = together(job, _forecast, student)
    return found, whose


def _student(job: Job) -> tuple[nn.Module, str]:
    """A network of the widths that will be trained, as far as they are known."""
    cut: Path = job.folder / "2-prune" / "model"
    if cut.is_dir():
        return toolchain.load(cut), "the pruned network of the run"
    if job.first_plan is not None:
        return toolchain.delete_units(job.dense, job.first_plan).cpu(), "a network of the planned widths"
    return job.dense.cpu(), "the dense network, since scores decide the widths: the pruned one takes less"


def _forecast(job: Job, student: nn.Module) -> Forecast:
    teacher = job.teacher or job.dense
    settings = distill_settings(job.recipe)
    return forecast(student, teacher, job.source, job.preprocess, settings, device=job.recipe.device)
