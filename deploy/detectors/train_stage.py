"""7-detect/NAME: a detector on a backbone, trained, judged in PyTorch, and exported."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.detectors import judge
from upvits.deploy.detectors.export import export_detector
from upvits.deploy.detectors.graph import LEVELS
from upvits.deploy.detectors.suppression import limits_of
from upvits.deploy.graphs.files import load_model
from upvits.deploy.recipe.detect import DetectRecipe, schedule_of, size_of
from upvits.deploy.runtimes import open_model
from upvits.deploy.stages.job import Job, read_json, stage, write_json
from upvits.deploy.store.artifacts import Artifact, canonical_digest, file_digest, open_artifact
from upvits.detection import configs, openmm
from upvits.detection.average_precision import average_precision
from upvits.detection.coco import CocoData, Split
from upvits.detection.decode import DecodedBoxes, Levels
from upvits.detection.detector import DetectorInfo, load_detector, save_detector
from upvits.detection.pictures import Fitted, fitted
from upvits.detection.training import train_detector
from upvits.toolchain.families import FAMILIES, family_of
from upvits.toolchain.structure.macs import count_macs, count_params
from upvits.toolchain.training.crew import ALONE, Crew
from upvits.toolchain.training.processes import pick_device

DETECT = "7-detect"
TRAINING = 1
"""Raise it when training gives another detector; the stage's version alone has it judged and exported again."""

_TRAINING = "training.json"
_AGREEMENT_IMAGES = 16
"""Images on which the exported detector is held against PyTorch, box by box."""


def trained(
    job: Job, name: str, backbone: nn.Module, digest: str, data: CocoData, wanted: DetectRecipe,
    teacher: Artifact | None = None, crew: Crew = ALONE,
) -> Artifact:  # fmt: skip
    """Train, judge and export a detector. One that was trained so before is only judged and exported again.

    Args:
        job: of the run.
        name: of the backbone, `dense` or `pruned`.
        backbone: a classifier whose features are used.
        digest: of its weights.
        data: what it is trained and judged on.
        wanted: resolved.
        teacher: the artifact of a detector whose pyramid is imitated.
        crew: processes that train on a share each.
    """

    settings = _settings(job, wanted)
    inputs = {"backbone": digest, "train": file_digest(data.train.annotations)}
    if teacher is not None:
        inputs["teacher"] = detector_digest(teacher.folder / "detector")
    training = {"version": TRAINING, "settings": settings, "inputs": inputs}
    before = job.folder / DETECT / name

    def work(folder: Path) -> None:
        if not (folder / "detector").exists() and _training_of(before) == training:
            shutil.copyfile(before / "history.json", folder / "history.json")
            for part in ("log", "detector"):  # the detector last: it says that all is there
                shutil.copytree(before / part, folder / part)
        if not (folder / "detector").exists():
            _train(folder, backbone, data, wanted, teacher, crew, seed=job.recipe.seed, quiet=job.quiet)
        tidy(folder)
        write_json(folder / _TRAINING, training)
        judged(folder, data, wanted, quiet=job.quiet)

    judging = {"size": list(size_of(wanted))}
    return stage(job, f"{DETECT}/{name}", settings | judging, inputs | {"coco": data.digest}, work, resumable=True)


def _settings(job: Job, wanted: DetectRecipe) -> dict[str, Any]:
    """What a training depends on beside its inputs."""
    apart = {"coco", "backbones", "workers", "tensorboard", "batches", "ap_images", "size"}
    return {**wanted.model_dump(mode="json", exclude=apart), "seed": job.recipe.seed}


def require_same_training(job: Job, name: str, digest: str, data: CocoData, wanted: DetectRecipe) -> None:
    """Hours of training are not replaced because a setting changed; a detector of an older network is. Args: `trained`.

    Raises:
        UserError: the detector that is there was trained on the same network with other settings.
    """
    folder = job.folder / DETECT / name
    known = _training_of(folder)
    if known is None or known["inputs"]["backbone"] != digest:
        return
    before, now = known["settings"], _settings(job, wanted)
    changes = [
        f"{key} is {before.get(key)}, {now.get(key)} was asked for"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if known["inputs"]["train"] != file_digest(data.train.annotations):
        changes.append("the training images are others")
    if changes:
        raise UserError(
            f"{folder} holds a detector that was trained otherwise: {'; '.join(changes)}.",
            why="Training again would replace it.",
            fix="Keep the settings, train in a copy of the run, or delete that folder.",
        )


def _training_of(folder: Path) -> dict[str, Any] | None:
    """How the detector in a stage's folder was trained, or None."""
    found = open_artifact(folder)
    return read_json(folder / _TRAINING) if found is not None and _TRAINING in found.manifest.files else None


def detector_digest(folder: Path) -> str:
    """sha256 of a detector, structure and weights."""
    return canonical_digest([file_digest(folder / name) for name in ("detector.json", "model.safetensors")])


def _train(
    folder: Path, backbone: nn.Module, data: CocoData, wanted: DetectRecipe, teacher: Artifact | None, crew: Crew, *,
    seed: int, quiet: bool,
) -> None:  # fmt: skip
    if not (folder / "backbone").exists():
        toolchain.save(backbone.cpu(), folder / "backbone")
    model = model_config(folder / "backbone", backbone, data, wanted)
    before = None if teacher is None else teacher.folder / "detector"
    train_into(folder, model, data, wanted, seed=seed, teacher=before, crew=crew, quiet=quiet)


def train_into(
    folder: Path, config: configs.Config, data: CocoData, wanted: DetectRecipe, *, seed: int, crew: Crew,
    start: Path | None = None, teacher: Path | None = None, quiet: bool = True,
) -> None:  # fmt: skip
    """Train, or continue, what a configuration describes; leaves `detector/` and `history.json` in `folder`.

    Args:
        folder: checkpoints and logs are kept there meanwhile.
        config: of the model.
        data: what it is trained on.
        wanted: resolved.
        seed: of the order of the images.
        crew: processes that train on a share each.
        start: folder of a detector whose weights it starts with.
        teacher: folder of a detector whose pyramid is imitated.
        quiet: no progress bar.
    """
    _require_judgeable(config, wanted.cfg_options)
    found = train_detector(
        config,
        data,
        schedule_of(wanted),
        folder / "work",
        seed=seed,
        options=wanted.cfg_options,
        start=start,
        teacher=teacher,
        distill_weight=wanted.imitation,
        crew=crew,
        quiet=quiet,
    )
    write_json(folder / "history.json", found.history)
    assert wanted.scale is not None
    info = DetectorInfo(found.config, data.classes, data.category_ids, wanted.scale)
    _keep_logs(folder / "work", folder / "log")
    save_detector(found.detector, info, folder / "detector")


def tidy(folder: Path) -> None:
    """Remove checkpoints and the copy of the backbone, also those of a process that was killed before it could: the
    detector holds all that is needed."""
    for scratch in ("work", "backbone"):
        shutil.rmtree(folder / scratch, ignore_errors=True)


def _keep_logs(work: Path, kept: Path) -> None:
    """mmengine's logs and curves, a folder for each time it was started; not its checkpoints."""
    kept.mkdir(exist_ok=True)
    for started in sorted(path for path in work.iterdir() if path.is_dir()):
        started.rename(kept / started.name)


def _require_judgeable(model: configs.Config, options: Mapping[str, Any]) -> None:
    """Refuse before training what could be trained, but not be judged or exported afterwards.

    Raises:
        UserError: says which option.
    """
    own = {name: value for name, value in options.items() if name.startswith("model.")}
    final = openmm.config_of({"model": model}, own).model
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


def model_config(folder: Path, backbone: nn.Module, data: CocoData, wanted: DetectRecipe) -> configs.Config:
    """The detector's configuration around a backbone."""
    preprocess = toolchain.preprocess_of(backbone)
    pixels = {name: [255 * value for value in getattr(preprocess, name)] for name in ("mean", "std")}
    own: configs.Config = {"type": "UPPVTv2", "model": str(folder)}
    if family_of(backbone) is not FAMILIES["pvt_v2"]:
        own["type"] = "UPViT"
        if wanted.detector == "retinanet":  # does not use the finest level, and unused weights get no gradients
            own["out_indices"] = [1, 2, 3]
    channels = openmm.channels_of(own)
    width = wanted.fpn_channels or 256
    if wanted.detector == "mask-rcnn":
        return configs.mask_rcnn(own, channels, len(data.classes), fpn_channels=width, **pixels)
    return configs.retinanet(
        own, channels, len(data.classes), fpn_channels=width, stacked_convs=wanted.stacked_convs or 4, **pixels
    )


def judged(folder: Path, data: CocoData, wanted: DetectRecipe, *, quiet: bool = True, export: bool = True) -> None:
    """AP in PyTorch of the detector in a folder; its ONNX file, and what the two find box by box."""
    detector, info = load_detector(folder / "detector")
    detector.to(pick_device("auto"))
    size, limits = size_of(wanted), limits_of(info.config)
    figures: dict[str, Any] = {"macs": None, "macs_800x1344": None, "agreement": None, "turned": None,
                               "masks": None}  # fmt: skip
    if wanted.detector == "retinanet":
        if export:
            export_detector(detector, info, folder / "model.onnx", size)
            figures["agreement"] = asdict(_agreement(folder, detector, info, data, wanted))
        figures["macs"] = count_macs(Levels(detector), (3, *size))
        figures["macs_800x1344"] = count_macs(Levels(detector), (3, 800, 1344))
    images = judge.watched_images(images_of(data.val, info, wanted), data.val.count, quiet)
    found = judge.found_by(detector, size, images, info.category_ids, limits)
    write_json(folder / judge.PREDICTIONS, found)
    if wanted.detector == "retinanet" and size[0] < size[1]:
        figures["turned"] = _turned(detector, info, data, size, found)
    if wanted.detector == "mask-rcnn":
        figures["masks"] = asdict(average_precision(data.val.annotations, found, kind="segm"))
    figures |= {
        "pytorch": asdict(average_precision(data.val.annotations, found)),
        "size": list(size),
        "params": count_params(detector),
        "backbone_params": count_params(detector.get_submodule("backbone")),
    }
    write_json(folder / "ap.json", figures)


def _agreement(
    folder: Path, detector: nn.Module, info: DetectorInfo, data: CocoData, wanted: DetectRecipe
) -> judge.Agreement:
    """The gate: the exported file finds what mmdet's own `predict` does."""
    some = images_of(data.val, info, wanted, _AGREEMENT_IMAGES)
    with open_model(load_model(folder / "model.onnx")) as session:
        engine, limits = judge.by_session(session), limits_of(info.config)
        there = copy.deepcopy(detector).cpu()  # where fp32 is fp32: GPUs may round convolutions to TF32
        found = judge.agreement(judge.by_mmdet(there), engine, some, limits)
    found.require()
    return found


def _turned(
    detector: nn.Module, info: DetectorInfo, data: CocoData, size: tuple[int, int], found: list[dict[str, Any]]
) -> dict[str, Any]:
    """AP where upright images are fitted into the turned size, as tables of detectors have it: no graph of one size
    does that. `found` is what was found at `size`, and holds for all other images.
    """
    turned = (size[1], size[0])
    seen: list[int] = []
    images = fitted(data.val, info.preprocess(turned), upright=True)
    run = judge.by_torch(DecodedBoxes(detector, turned).eval())
    upright = judge.detections(run, judge.noting(images, seen), info.category_ids, limits_of(info.config))
    known = set(seen)
    others = [box for box in found if box["image_id"] not in known]
    return asdict(average_precision(data.val.annotations, [*others, *upright]))


def images_of(split: Split, info: DetectorInfo, wanted: DetectRecipe, most: int | None = None) -> Iterator[Fitted]:
    """Images of a split as a detector takes them, one at a time; evenly spread ones where `most` are fewer."""
    return fitted(split, info.preprocess(size_of(wanted)), most)


def figures_of(artifact: Artifact) -> dict[str, Any]:
    """What `ap.json` of a detector says."""
    return read_json(artifact.folder / "ap.json")
