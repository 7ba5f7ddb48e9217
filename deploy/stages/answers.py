"""What both networks answer to single images and classes, from outputs that the export keeps: no image is run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from upvits.calib_data.documents import parse_document, read_regular
from upvits.deploy.choices import MODELS
from upvits.deploy.measure.answers import Array, best_classes, counts_by_class, thumbnail, worth_showing
from upvits.deploy.recipe.request import Job
from upvits.deploy.report.answers import MOST_CLASSES, Answer, Answers, ClassFigures, Epoch, Sample
from upvits.deploy.stages.job import validation_images
from upvits.deploy.store.artifacts import Artifact
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.structure.timm_config import num_classes_of
from upvits.toolchain.training.state import EpochLog

_SAMPLES, _TOP = 12, 3
_THUMBNAIL = 192
_NAME = 200


def answers(job: Job, exported: Artifact) -> Answers | None:
    """Classes and sample images of a run; None for networks without classes."""
    if not num_classes_of(job.dense):
        return None
    kept = load_file(exported.folder / "accuracy_reference.safetensors")
    labels = kept["labels"]
    dense, pruned = (kept[model].argmax(1) for model in MODELS)
    names = job.source.class_names or label_names_of(job.dense) or ()
    classes = [
        ClassFigures(name=_name(names, label), **asdict(counts))
        for label, counts in counts_by_class(dense, pruned, labels).items()
    ]
    classes.sort(key=lambda figures: (figures.change, -figures.images, figures.name))
    return Answers(
        images=len(labels),
        differing=int(np.sum(dense != pruned)),
        classes=classes[:MOST_CLASSES],
        classes_left_out=max(0, len(classes) - MOST_CLASSES),
        samples=_samples(job, kept, worth_showing(dense, pruned, labels, _SAMPLES), names),
    )


def learning(tuned: Artifact) -> list[Epoch]:
    """The epochs of the fine-tune as its log has them."""
    path = tuned.folder / "log.jsonl"
    if not path.exists():
        return []
    fix = "Remove 3-distill and continue the run."
    lines = read_regular(path, fix=fix).decode(errors="replace").splitlines()
    logged = [parse_document(line, str(path), EpochLog, fix=fix) for line in lines]
    return [Epoch(epoch=e.epoch, loss=e.loss, top1=e.top1, agreement=e.agreement, seconds=e.seconds) for e in logged]


def _samples(job: Job, kept: dict[str, Array], chosen: Sequence[int], names: Sequence[str]) -> list[Sample]:
    images = validation_images(job.source, job.recipe.export.accuracy_images)
    return [
        Sample(
            truth=_name(names, int(kept["labels"][place])) if kept["labels"][place] >= 0 else None,
            dense=_answers(kept["dense"][place], names),
            pruned=_answers(kept["pruned"][place], names),
            agree=bool(kept["dense"][place].argmax() == kept["pruned"][place].argmax()),
            image=thumbnail(images[place][0], _THUMBNAIL),
        )
        for place in chosen
    ]


def _answers(logits: np.ndarray[Any, Any], names: Sequence[str]) -> list[Answer]:
    return [
        Answer(label=_name(names, index), percent=round(percent, 2)) for index, percent in best_classes(logits, _TOP)
    ]


def _name(names: Sequence[str], label: int) -> str:
    return names[label][:_NAME] if label < len(names) else f"class {label}"
