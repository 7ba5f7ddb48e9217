"""0-dense: what the dense network answers, and the end of the run where that is far below what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from upvits.calib_data import Images, Preprocess, batches
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import NORMALISATIONS, SIZES
from upvits.calib_data.tensors import save_tensors
from upvits.deploy.recipe.request import Job
from upvits.deploy.stages.documents import DenseAccuracy, NetworkAccuracy
from upvits.deploy.stages.job import EVAL_BATCH, accuracy_of, accuracy_record, stage
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import load_document, save_document
from upvits.toolchain.networks.found import found_in
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.networks.settle import taken_for
from upvits.toolchain.structure.timm_config import num_classes_of
from upvits.toolchain.training.evaluate import evaluate

FEWEST = 20
"""Validation images below which an accuracy says too little to end a run."""

WEAK = 0.1
"""Share of the way from guessing to always right below which a network counts as weak."""

FAR_BELOW = 10
"""Points below the accuracy that a checkpoint recorded, beyond two deviations of chance, that end a run."""

_TRIED = 64  # images that another preparation is tried on

Reason = tuple[float, str]
"""Percent of images that would be right, and what would have to change."""


def judge_dense(job: Job) -> Artifact:
    """0-dense: accuracy and predictions of the dense network on all validation images.

    Raises:
        UserError: it is hardly better than guessing, or far below what its checkpoint recorded; its weights are not
            random, and the recipe does not allow it.
    """

    def work(folder: Path) -> None:
        dense = accuracy_of(job, job.dense)
        save_tensors({"predictions": dense.predictions}, folder / "predictions.safetensors")
        save_document(folder / "accuracy.json", DenseAccuracy(dense=accuracy_record(dense)))

    artifact = stage(job, "0-dense", {}, job.inputs, work)
    if job.recipe.weights != "random" and not job.recipe.allow_weak:
        _require_strong(job, accuracy_of_dense(artifact), predictions_of_dense(artifact))
    return artifact


def predictions_of_dense(judged: Artifact) -> Tensor:
    """Predictions [images] int64 of the dense network on the validation images."""
    return load_file(judged.folder / "predictions.safetensors")["predictions"]


def accuracy_of_dense(judged: Artifact) -> NetworkAccuracy:
    """Its accuracy."""
    return load_document(judged.folder / "accuracy.json", DenseAccuracy).dense


def _require_strong(job: Job, accuracy: NetworkAccuracy, predictions: Tensor) -> None:
    what = _weakness(job, accuracy)
    if what is None:
        return
    labels = torch.tensor(job.source.val.labels)
    reasons = sorted(
        (_other_numbers(labels, predictions, job.source.class_names or ()), _normalisation(job), _size(job)),
        key=lambda reason: -reason[0],
    )
    raise UserError(
        f"The dense network is right on {accuracy.top1:.1f} % of {accuracy.images} validation images; {what}.",
        why="Nothing could be told of a network that is cut from it. What may be wrong, the likeliest first: "
        + "; ".join(f"{number}. {text}" for number, (_, text) in enumerate(reasons, 1))
        + ".",
        fix="Set right what is wrong: --class-order or --class-map, --mean and --std that the weights were trained "
        "with, --image-size. --allow-weak goes on as it is.",
    )


def _weakness(job: Job, accuracy: NetworkAccuracy) -> str | None:
    """What a network falls short of; None: of nothing that is known."""
    if accuracy.top1 is None or accuracy.images < FEWEST:
        return None
    guessing = 100 / num_classes_of(job.dense)
    if accuracy.top1 < guessing + WEAK * (100 - guessing):
        return f"guessing gives {guessing:.1f} %"
    recorded = found_in(job.dense).accuracy
    noise = 100 * (accuracy.top1 / 100 * (1 - accuracy.top1 / 100) / accuracy.images) ** 0.5
    if recorded is not None and accuracy.top1 < recorded - FAR_BELOW - 2 * noise:
        return f"its checkpoint recorded {recorded:.1f} %"
    return None


def _other_numbers(labels: Tensor, predictions: Tensor, names: tuple[str, ...]) -> Reason:
    """Accuracy with every class renumbered to what its images are taken for: learnt on every other image, judged on
    the rest.
    """
    order = torch.argsort(labels, stable=True)
    learnt, judged = order[::2], order[1::2]
    meant: dict[int, int] = {}
    for label in sorted(set(labels.tolist())):
        of_label = predictions[learnt][labels[learnt] == label]
        if label >= 0 and len(of_label):
            meant[label] = int(of_label.mode().values)
    hits = [meant.get(label) == guess for label, guess in zip(labels[judged].tolist(), predictions[judged].tolist(),
                                                              strict=True)]  # fmt: skip
    top1 = 100 * sum(hits) / max(1, len(hits))
    if len(set(meant.values())) < 0.9 * len(meant):  # many classes are taken for the same one
        top1 = 0.0
    moved = next(((label, other) for label, other in meant.items() if label != other), None)
    if moved is None or top1 < 1:
        return 0.0, "the order of classes (no other numbers help)"
    example = f"images of {_name(names, moved[0])} are taken for {_name(names, moved[1])}"
    return top1, f"the order of classes (with other numbers {top1:.1f} % are right: {example})"


def _name(names: tuple[str, ...], label: int) -> str:
    return repr(names[label]) if label < len(names) else f"class {label}"


def _normalisation(job: Job) -> Reason:
    if job.preprocess.input_size[0] != 3:
        return 0.0, "the normalisation (there is no usual one but for three channels)"
    tried = {
        name: replace(job.preprocess, mean=mean, std=std)
        for name, (mean, std) in NORMALISATIONS.items()
        if (mean, std) != (job.preprocess.mean, job.preprocess.std)
    }
    return _best(job, "the normalisation", tried)


def _size(job: Job) -> Reason:
    channels, height, width = job.preprocess.input_size
    others = found_in(job.dense).other_sizes
    if others:
        images = job.source.val.spread(_TRIED)
        networks = {f"{one} x {other}": taken_for(job.dense, (one, other)) for one, other in others}
        found = {name: _top1(network, images, preprocess_of(network)) for name, network in networks.items()}
        best = max(found, key=found.__getitem__)
        return found[best], (
            f"the image size (the position embedding is taken for {height} x {width} pixels and fits "
            f"{', '.join(networks)}, too: at best, with {best}, {found[best]:.1f} % of {len(images)} images are right)"
        )
    if getattr(job.dense.get_submodule("patch_embed"), "img_size", None) is not None:
        return 0.0, f"the image size ({height} x {width} belongs to the weights)"
    sizes = {
        f"{size} pixels": replace(job.preprocess, input_size=(channels, size, size))
        for size in SIZES
        if (size, size) != (height, width)
    }
    return _best(job, "the image size", sizes)


def _best(job: Job, what: str, tried: Mapping[str, Preprocess]) -> Reason:
    images = job.source.val.spread(_TRIED)
    found = {name: _top1(job.dense, images, preprocess) for name, preprocess in tried.items()}
    name = max(found, key=found.__getitem__)
    return found[name], f"{what} (at best, with {name}, {found[name]:.1f} % of {len(images)} images are right)"


def _top1(model: nn.Module, images: Images, preprocess: Preprocess) -> float:
    return evaluate(model, batches(images, preprocess, EVAL_BATCH)).top1 or 0.0
