"""7-detect/NAME: a detector on a backbone, trained, judged in PyTorch, and exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.detectors.accuracy import judge_detector
from upvits.deploy.detectors.documents import TrainingRecord
from upvits.deploy.detectors.graph import LEVELS
from upvits.deploy.detectors.suppression import limits_of
from upvits.deploy.recipe.detect import DetectRecipe, schedule_of, size_of
from upvits.deploy.recipe.request import Job
from upvits.deploy.stages.job import stage, write_json
from upvits.deploy.store.artifacts import Artifact, canonical_digest, file_digest, open_artifact
from upvits.deploy.store.documents import load_document, save_document
from upvits.detection import configs, openmm
from upvits.detection.coco import CocoData
from upvits.detection.detector import DetectorInfo, save_detector
from upvits.detection.training import train_detector
from upvits.toolchain.families import FAMILIES, family_of

DETECT = "7-detect"
TRAINING = 1
"""Raise it when training gives another detector; raising the stage's version has it judged and exported again."""

_RECORD = "training.json"


def trained(
    job: Job, name: str, backbone: nn.Module, digest: str, data: CocoData, recipe: DetectRecipe,
    teacher: Artifact | None = None,
) -> Artifact:  # fmt: skip
    """Train, judge and export a detector. A detector of the same training is only judged and exported again.

    Args:
        job: of the run.
        name: of the backbone, `dense` or `pruned`.
        backbone: a classifier whose features are used.
        digest: of its weights.
        data: what it is trained and judged on.
        recipe: resolved.
        teacher: the artifact of a detector whose pyramid is imitated.
    """
    inputs = {"backbone": digest, "train": file_digest(data.train.annotations)}
    if teacher is not None:
        inputs["teacher"] = detector_digest(teacher.folder / "detector")
    training = TrainingRecord(version=TRAINING, settings=_settings(job, recipe), inputs=inputs)
    before = job.folder / DETECT / name

    def work(folder: Path) -> None:
        if not (folder / "detector").exists() and _training_of(before) == training:
            shutil.copyfile(before / "history.json", folder / "history.json")
            for part in ("log", "detector"):  # the detector last: train_into takes it for whole
                shutil.copytree(before / part, folder / part)
        train_into(
            folder, _new_detector(folder, backbone, data, recipe), data, recipe, seed=job.recipe.seed,
            teacher=None if teacher is None else teacher.folder / "detector", quiet=job.quiet,
        )  # fmt: skip
        save_document(folder / _RECORD, training)
        judge_detector(folder, data, size_of(recipe), quiet=job.quiet)

    settings = training.settings | {"size": list(size_of(recipe))}
    return stage(job, f"{DETECT}/{name}", settings, inputs | {"coco": data.digest}, work, resumable=True)


def _settings(job: Job, recipe: DetectRecipe) -> dict[str, Any]:
    """What a training depends on beside its inputs."""
    apart = {"coco", "backbones", "workers", "tensorboard", "batches", "ap_images", "size"}
    return {**recipe.model_dump(mode="json", exclude=apart), "seed": job.recipe.seed}


def require_same_training(job: Job, name: str, digest: str, data: CocoData, recipe: DetectRecipe) -> None:
    """Refuse to replace hours of training because a setting changed. Args: as of `trained`.

    A detector on another network than the run's is out of date, and may be replaced.

    Raises:
        UserError: the run has a detector that was trained on the same network with other settings.
    """
    folder = job.folder / DETECT / name
    training = _training_of(folder)
    if training is None or training.inputs.get("backbone") != digest:
        return
    before, now = training.settings, _settings(job, recipe)
    changes = [
        f"{key} is {before.get(key)}, {now.get(key)} was asked for"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if training.inputs.get("train") != file_digest(data.train.annotations):
        changes.append("the training images are others")
    if changes:
        raise UserError(
            f"{folder} holds a detector that was trained otherwise: {'; '.join(changes)}.",
            why="Training again would replace it.",
            fix="Keep the settings, train in a copy of the run, or delete that folder.",
        )


def _training_of(folder: Path) -> TrainingRecord | None:
    """How the detector in a stage's folder was trained; None where there is no detector."""
    artifact = open_artifact(folder)
    if artifact is None or _RECORD not in artifact.manifest.files:
        return None
    return load_document(folder / _RECORD, TrainingRecord)


def detector_digest(folder: Path) -> str:
    """sha256 of a detector, structure and weights."""
    return canonical_digest([file_digest(folder / name) for name in ("detector.json", "model.safetensors")])


def train_into(
    folder: Path, model: configs.Config, data: CocoData, recipe: DetectRecipe, *, seed: int,
    start: Path | None = None, teacher: Path | None = None, quiet: bool = True,
) -> None:  # fmt: skip
    """Train a detector, or continue; a detector that is in the folder already is whole, and left as it is.

    Leaves `detector/`, `history.json` and mmengine's `log/` in the folder. Checkpoints and the copy of the backbone are
    removed, also those that a process left when it was killed.

    Args:
        folder: of the stage.
        model: its configuration.
        data: what it is trained on.
        recipe: resolved.
        seed: of the order of the images.
        start: folder of a detector whose weights it starts with.
        teacher: folder of a detector whose pyramid is imitated.
        quiet: no progress bar.
    """
    work = folder / "work"
    if not (folder / "detector").exists():
        _require_judgeable(model, recipe.cfg_options)
        trained = train_detector(
            model, data, schedule_of(recipe), work, seed=seed, options=recipe.cfg_options, start=start,
            teacher=teacher, distill_weight=recipe.imitation, quiet=quiet,
        )  # fmt: skip
        write_json(folder / "history.json", trained.history)
        assert recipe.scale is not None
        _keep_logs(work, folder / "log")
        info = DetectorInfo(trained.config, data.classes, data.category_ids, recipe.scale)
        save_detector(trained.detector, info, folder / "detector")
    for scratch in (work, folder / "backbone"):
        shutil.rmtree(scratch, ignore_errors=True)


def _keep_logs(work: Path, kept: Path) -> None:
    """mmengine's logs and curves, a folder for each time it was started; not its checkpoints."""
    kept.mkdir(exist_ok=True)
    for started in sorted(path for path in work.iterdir() if path.is_dir()):
        started.rename(kept / started.name)


def _require_judgeable(model: configs.Config, options: Mapping[str, Any]) -> None:
    """Refuse a detector that could be trained, but not be judged or exported afterwards.

    Raises:
        UserError: names the option.
    """
    of_model = {name: value for name, value in options.items() if name.startswith("model.")}
    final = openmm.config_of({"model": model}, of_model).model
    limits_of(final)
    levels = final.neck.num_outs
    if final.type == "RetinaNet" and levels != LEVELS:
        raise UserError(
            f"A RetinaNet of {levels} levels cannot be exported.",
            why=f"The graph has {LEVELS}, from stride 8 to 128.",
            fix="Leave model.neck.num_outs out of --cfg-options.",
        )
    if not final.data_preprocessor.bgr_to_rgb:
        raise UserError(
            "model.data_preprocessor.bgr_to_rgb cannot be switched off.", fix="Backbones take RGB, as timm's do."
        )


def _new_detector(folder: Path, backbone: nn.Module, data: CocoData, recipe: DetectRecipe) -> configs.Config:
    """The configuration of a detector around a backbone, of which `backbone/` in the folder becomes a copy."""
    copied = folder / "backbone"
    if not copied.exists():
        toolchain.save(backbone.cpu(), copied)
    values: configs.Config = {"type": "UPPVTv2", "model": str(copied)}
    if family_of(backbone) is not FAMILIES["pvt_v2"]:
        values["type"] = "UPViT"
        if recipe.detector == "retinanet":  # does not use the finest level, and unused weights get no gradients
            values["out_indices"] = [1, 2, 3]
    preprocess = toolchain.preprocess_of(backbone)
    arguments: dict[str, Any] = {
        "backbone": values,
        "channels": openmm.channels_of(values),
        "num_classes": len(data.classes),
        "fpn_channels": recipe.fpn_channels or 256,
        "mean": [255 * value for value in preprocess.mean],
        "std": [255 * value for value in preprocess.std],
    }
    if recipe.detector == "mask-rcnn":
        return configs.mask_rcnn(**arguments)
    return configs.retinanet(**arguments, stacked_convs=recipe.stacked_convs or 4)
