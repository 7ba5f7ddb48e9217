"""3-distill: the pruned network fine-tuned against its dense parent, or its weights from a training elsewhere."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from upvits import toolchain
from upvits.deploy.recipe.request import Job, distill_settings
from upvits.deploy.stages.dense import predictions_of_dense
from upvits.deploy.stages.documents import TunedAccuracy
from upvits.deploy.stages.job import (
    accuracy_of,
    accuracy_record,
    stage,
)
from upvits.deploy.stages.together import together
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import save_document
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.retrained import with_weights


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

    def work(folder: Path) -> None:
        if not (folder / "model").exists():
            student = toolchain.load(pruned.folder / "model")
            tuned = together(job, _tuned, student, str(folder)) if brought is None else brought
            toolchain.save(tuned, folder / "model")
        tuned = toolchain.load(folder / "model").to(job.device)
        tuned_accuracy = accuracy_record(accuracy_of(job, tuned, predictions_of_dense(judged)))
        save_document(folder / "accuracy.json", TunedAccuracy(after_distill=tuned_accuracy))
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    return stage(
        job,
        "3-distill",
        settings,
        inputs,
        work,
        resumable=True,
    )


def _tuned(job: Job, student: nn.Module, folder: str) -> nn.Module:
    """The student after its training, on the CPU. Processes share every batch; the first one uses the folder."""
    settings, device = distill_settings(job.recipe), job.recipe.device
    result = toolchain.distill(
        student, job.dense, job.source, job.preprocess, settings, Path(folder), device=device, quiet=job.quiet
    )
    return result.model.cpu()
