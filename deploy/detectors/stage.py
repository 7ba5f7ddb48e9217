"""7-detect: a detector on the dense and on the pruned backbone, trained by the same schedule, judged and exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import toolchain
from deploy.artifacts import Artifact
from deploy.detectors import judge
from deploy.detectors.export import export_detector
from deploy.detectors.recipe import DetectRecipe, schedule_of
from deploy.graphs.files import load_model
from deploy.job import Job, stage, write_json
from deploy.runtimes import open_model
from detection import configs
from detection.average_precision import average_precision
from detection.backbone import UPPVTv2
from detection.coco import CocoData
from detection.decode import DecodedBoxes, Levels
from detection.detector import DetectorInfo, load_detector, save_detector
from detection.pictures import fitted
from detection.simple_pyramid import UPViT
from detection.training import train_detector
from toolchain.families import FAMILIES, family_of
from toolchain.macs import count_macs, count_params

AGREEMENT_IMAGES = 16
"""Images on which the exported detector is held against PyTorch, box by box."""


def detect(
    job: Job, name: str, backbone: nn.Module, digest: str, data: CocoData, wanted: DetectRecipe,
    teacher: Artifact | None = None,
) -> Artifact:  # fmt: skip
    """Train, judge and export a detector.

    Args:
        job: of the run.
        name: of the backbone, `dense` or `pruned`.
        backbone: a classifier whose features are used.
        digest: of its weights.
        data: what it is trained and judged on.
        wanted: resolved.
        teacher: the artifact of a detector whose pyramid is imitated.
    """

    def work(folder: Path) -> None:
        if not (folder / "detector").exists():
            _train(folder, backbone, data, wanted, teacher, seed=job.recipe.seed, quiet=job.quiet)
        _judge(folder, data, wanted)

    settings = {**wanted.model_dump(mode="json", exclude={"coco", "backbones", "workers"}), "seed": job.recipe.seed}
    inputs = {"backbone": digest, "coco": data.digest}
    if teacher is not None:
        inputs["teacher"] = teacher.digest
    return stage(job, f"7-detect/{name}", settings, inputs, work, resumable=True)


def _train(
    folder: Path, backbone: nn.Module, data: CocoData, wanted: DetectRecipe, teacher: Artifact | None, *, seed: int,
    quiet: bool,
) -> None:  # fmt: skip
    if not (folder / "backbone").exists():
        toolchain.save(backbone.cpu(), folder / "backbone")
    model = model_config(folder / "backbone", backbone, data, wanted)
    trained = train_detector(
        model,
        data,
        schedule_of(wanted),
        folder / "work",
        seed=seed,
        options=wanted.cfg_options,
        teacher=None if teacher is None else load_detector(teacher.folder / "detector")[0],
        distill_weight=wanted.imitation,
        quiet=quiet,
    )
    write_json(folder / "history.json", trained.history)
    assert wanted.scale is not None
    info = DetectorInfo(trained.config, data.classes, data.category_ids, wanted.scale)
    save_detector(trained.detector, info, folder / "detector")


def model_config(folder: Path, backbone: nn.Module, data: CocoData, wanted: DetectRecipe) -> configs.Config:
    """The detector's configuration around a backbone."""
    preprocess = toolchain.preprocess_of(backbone)
    pixels = {name: [255 * value for value in getattr(preprocess, name)] for name in ("mean", "std")}
    pyramid = family_of(backbone) is FAMILIES["pvt_v2"]
    made = UPPVTv2(folder) if pyramid else UPViT(folder)
    own = {"type": type(made).__name__, "model": str(folder)}
    width = wanted.fpn_channels or 256
    if wanted.detector == "mask-rcnn":
        return configs.mask_rcnn(own, made.channels, len(data.classes), fpn_channels=width, **pixels)
    return configs.retinanet(
        own, made.channels, len(data.classes), fpn_channels=width, stacked_convs=wanted.stacked_convs or 4, **pixels
    )


def _judge(folder: Path, data: CocoData, wanted: DetectRecipe) -> None:
    """AP in PyTorch and of the exported graph on the same images, and what the two find box by box."""
    detector, info = load_detector(folder / "detector")
    assert wanted.size is not None
    size = (wanted.size[0], wanted.size[1])
    decoded = DecodedBoxes(detector, size).eval()
    export_detector(detector, info, folder / "model.onnx", size)
    pixels = info.config["data_preprocessor"]
    images = list(fitted(data.val, size, tuple(pixels["mean"]), tuple(pixels["std"])))
    found = judge.detections(judge.by_torch(decoded), images, info.category_ids)
    write_json(folder / "predictions.json", found)
    with open_model(load_model(folder / "model.onnx")) as session:
        engine = judge.by_session(session)
        by_engine = judge.detections(engine, images, info.category_ids)
        some = np.stack([image.pixels.numpy() for image in images[:AGREEMENT_IMAGES]])
        agreement = judge.agreement(judge.by_torch(decoded), engine, some)
    figures: Mapping[str, Any] = {
        "pytorch": asdict(average_precision(data.val.annotations, found)),
        "onnxruntime": asdict(average_precision(data.val.annotations, by_engine)),
        "agreement": asdict(agreement),
        "size": list(size),
        "params": count_params(detector),
        "macs": count_macs(Levels(detector), (3, *size)),
        "macs_800x1344": count_macs(Levels(detector), (3, 800, 1344)),
    }
    write_json(folder / "ap.json", figures)


def figures_of(artifact: Artifact) -> dict[str, Any]:
    """What `ap.json` of a detector says."""
    found: dict[str, Any] = json.loads((artifact.folder / "ap.json").read_text())
    return found
