"""What all stages share: how one runs in the folder of its job, and the images that networks are judged on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upvits.calib_data import DataSource, Images, batches
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import raw_pixels
from upvits.deploy.measure.accuracy import outputs_of
from upvits.deploy.recipe.request import Job
from upvits.deploy.runtimes import Session
from upvits.deploy.stages.documents import NetworkAccuracy
from upvits.deploy.stages.together import together
from upvits.deploy.store.artifacts import Artifact, atomic_write, run_stage
from upvits.toolchain.training.evaluate import Accuracy, evaluate_images

_LOGGER = logging.getLogger(__name__)

EVAL_BATCH = 64
VERSIONS = {
    "0-dense": 1, "1-score": 5, "2-prune": 8, "3-distill": 4, "4-export": 3, "4-precision": 1, "5-engine": 3,
    "6-bench": 3, "7-detect": 2,
}  # fmt: skip
"""Raise a stage's number when its code gives other results: artifacts of the old code are then made again."""

Pixels = np.ndarray[Any, np.dtype[Any]]


def stage(
    job: Job,
    name: str,
    settings: Mapping[str, object],
    inputs: Mapping[str, str],
    work: Callable[[Path], None],
    *,
    resumable: bool = False,
) -> Artifact:
    """`run_stage` in the job's directory, with a line about it in the log."""
    artifact = run_stage(
        job.folder, name, settings, inputs, work, version=VERSIONS[name.split("/")[0]], resumable=resumable
    )
    if not artifact.skipped and not name.startswith("7-"):  # a report of what was there before would now be wrong
        for report in ("report.json", "report.md", "report.html"):
            (job.folder / report).unlink(missing_ok=True)
    announce(name, artifact)
    return artifact


def announce(name: str, artifact: Artifact) -> None:
    """A line about a stage that is whole."""
    took = "as before" if artifact.skipped else f"{artifact.manifest.seconds:.1f} s"
    _LOGGER.info("%s: %s", name, took)


def write_json(path: Path, document: object) -> None:
    """Write a JSON document; it appears whole or not at all."""
    atomic_write(path, (json.dumps(document, indent=2) + "\n").encode())


def validation_images(source: DataSource, most: int) -> Images:
    """At most so many validation images, evenly spread, since folders come class by class.

    Raises:
        UserError: there are none.
    """
    if not len(source.val):
        raise UserError("The data have no validation images.", fix="Parity and latency are measured on real images.")
    return source.val.spread(most)


def parity_images(job: Job) -> Tensor:
    """Some validation images [N, 3, H, W], as the network sees them."""
    chosen = validation_images(job.source, job.recipe.export.parity_images)
    return torch.cat([images for images, _ in batches(chosen, job.preprocess, EVAL_BATCH)])


def validation_outputs(
    job: Job, sessions: Mapping[str, Session], batch_size: int = EVAL_BATCH
) -> tuple[dict[str, Pixels], Pixels]:
    """Outputs [N, K] of sessions by name, and labels [N], on the validation images that precisions are judged on."""
    chosen = validation_images(job.source, job.recipe.export.accuracy_images)
    fed = ((model_input(job, images), labels.numpy()) for images, labels in batches(chosen, job.preprocess, batch_size))
    return outputs_of(sessions, fed, batch_size, total=-(-len(chosen) // batch_size), quiet=job.quiet)


def model_input(job: Job, images: Tensor) -> Pixels:
    """A batch as the exported model takes it: normalised, or raw pixels with `uint8_input`."""
    return raw_pixels(images, job.preprocess) if job.recipe.export.uint8_input else np.asarray(images.numpy())


def accuracy_of(job: Job, model: nn.Module, reference: Tensor | None = None) -> Accuracy:
    """A network on all validation images; agreement with the predictions in `reference`. All processes take part."""
    sent = None if model is job.dense else model.cpu()
    return together(job, _accuracy, sent, reference)


def _accuracy(job: Job, model: nn.Module | None, reference: Tensor | None) -> Accuracy:
    model, workers = job.dense if model is None else model.to(job.device), job.recipe.distill.workers or 0
    return evaluate_images(
        model, job.source.val, job.preprocess, EVAL_BATCH, reference=reference, quiet=job.quiet, workers=workers
    )


def accuracy_record(accuracy: Accuracy) -> NetworkAccuracy:
    """An accuracy as documents hold it, without the predictions."""
    return NetworkAccuracy(
        top1=accuracy.top1,
        agreement=accuracy.agreement,
        images=accuracy.images,
        labelled=accuracy.labelled,
        lost=accuracy.lost,
        won=accuracy.won,
    )
