"""3-distill: the pruned network fine-tuned against its dense parent, or its weights from a training elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from upvits import toolchain
from upvits.deploy.recipe.request import Job, distill_settings
from upvits.deploy.stages.dense import accuracy_of_dense, predictions_of_dense
from upvits.deploy.stages.documents import NetworkAccuracy, TunedAccuracy
from upvits.deploy.stages.job import EVAL_BATCH, accuracy_of, accuracy_record, stage
from upvits.deploy.stages.together import together
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import save_document
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.retrained import with_weights
from upvits.toolchain.training.evaluate import evaluate_images
from upvits.toolchain.training.teacher import Teacher

_LOGGER = logging.getLogger(__name__)


def distill(job: Job, judged: Artifact, pruned: Artifact) -> Artifact:
    """3-distill: the pruned network fine-tuned against its dense parent; continues after a kill.

    Raises:
        UserError: the weights of `--finetuned` are those of another network.
    """
    settings: dict[str, object] = distill_settings(job.recipe).decisive
    inputs = {**job.inputs, "judged": judged.digest, "pruned": pruned.digest}
    brought = None
    if job.recipe.distill.finetuned is not None:
        brought = with_weights(toolchain.load(pruned.folder / "model"), Path(job.recipe.distill.finetuned))
        settings, inputs["finetuned"] = {}, weights_digest(brought)

    elif job.teacher is not None:
        inputs["teacher"] = weights_digest(job.teacher.model)

    def work(folder: Path) -> None:
        teacher = None if job.teacher is None else _judged_teacher(job, job.teacher, judged)
        if not (folder / "model").exists():
            student = toolchain.load(pruned.folder / "model")
            tuned = together(job, _tuned, student, str(folder)) if brought is None else brought
            toolchain.save(tuned, folder / "model")
        tuned = toolchain.load(folder / "model").to(job.device)
        tuned_accuracy = accuracy_record(accuracy_of(job, tuned, predictions_of_dense(judged)))
        save_document(folder / "accuracy.json", TunedAccuracy(after_distill=tuned_accuracy, teacher=teacher))
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    return stage(
        job,
        "3-distill",
        settings,
        inputs,
        work,
        resumable=True,
    )


def _judged_teacher(job: Job, teacher: Teacher, judged: Artifact) -> NetworkAccuracy:
    """What the teacher knows; a warning where that is less than the dense network does.

    It may have read other images, or others of its own: normalised otherwise, with classes in another order. That shows
    here, and nowhere else.
    """
    size, workers = EVAL_BATCH, job.recipe.distill.workers or 0
    reference = predictions_of_dense(judged)
    model = teacher.model.to(job.device)
    found = evaluate_images(
        model, job.source.val, teacher.preprocess, size, reference=reference, quiet=job.quiet, workers=workers
    )
    dense = accuracy_of_dense(judged)
    if found.top1 is not None and dense.top1 is not None and found.top1 < dense.top1:
        _LOGGER.warning(
            "The teacher %s is right on %.1f %% of the validation images, the dense network on %.1f %%: it teaches "
            "less than the dense network would. Are its normalisation, its size and the order of its classes those "
            "that it was trained with?",
            job.recipe.distill.teacher, found.top1, dense.top1,
        )  # fmt: skip
    return accuracy_record(found)


def _tuned(job: Job, student: nn.Module, folder: str) -> nn.Module:
    """The student after its training, on the CPU. Processes share every batch; the first one uses the folder."""
    settings, device = distill_settings(job.recipe), job.recipe.device
    teacher = job.teacher or job.dense
    result = toolchain.distill(
        student, teacher, job.source, job.preprocess, settings, Path(folder), device=device, quiet=job.quiet
    )
    return result.model.cpu()
