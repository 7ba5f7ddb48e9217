"""A trained detector pruned directly: scored by its own maps, cut with pyramid and head, refitted, fine-tuned."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.calib_data.tensors import save_tensors
from upvits.deploy.detectors.accuracy import judge_detector
from upvits.deploy.detectors.train_stage import detector_digest, train_into
from upvits.deploy.recipe.detect import DetectRecipe, PruneRecipe, resolved, size_for, size_of
from upvits.deploy.recipe.detect_data import check_detection, open_detection_data
from upvits.deploy.stages.job import announce, write_json
from upvits.deploy.store.artifacts import Artifact, run_stage
from upvits.deploy.store.run_dir import open_run
from upvits.detection.coco import CocoData
from upvits.detection.detector import DetectorInfo, load_detector, read_info, save_detector
from upvits.detection.detector_scores import DetectorScores, conv_groups, score_detector
from upvits.detection.detector_surgery import cut_detector, kept_channels
from upvits.detection.pictures import fitted
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.processes.process import pick_device
from upvits.toolchain.scores import Scores

VERSION = 2
EPOCHS, LR = 0.4, 0.3
"""Shares of the usual schedule for fine-tuning. On the drawn scenes, 3 epochs at 0.1, 0.3 and 1 of the rate brought a
refitted detector from AP 72.4 to 80.0, 80.4 and 80.1 (dense 82.3; one seed each): it matters little."""
_IDENTITY = ("detector", "prune")
_CHANNEL_SCORES = "neck_and_head.safetensors"


def prune_detector(
    folder: Path, cut: PruneRecipe, training: DetectRecipe, out: Path, *, fine_tune: bool = True, quiet: bool = True
) -> dict[str, Artifact]:
    """Prune a detector, or continue: `0-dense`, `1-score`, `2-prune` and `3-train` in a folder.

    Args:
        folder: of the detector.
        cut: what is cut.
        training: data and schedule of the fine-tuning.
        out: a run directory of its own.
        fine_tune: train after the cut.
        quiet: no progress bars.

    Returns:
        Artifacts by name of the stage.

    Raises:
        UserError: it is no RetinaNet with a timm backbone, or the request cannot be met.
        MissingDependencyError: mmdet is not installed.
    """
    info = read_info(folder)
    training = _schedule(info, cut, training)
    data = open_detection_data(training.coco, quiet=quiet)
    if info.classes != data.classes:
        raise UserError(
            f"{folder} knows other categories than {training.coco}.", fix="Give the data it was trained on."
        )
    dense, _ = load_detector(folder)
    _plan(dense, _random_scores(dense, cut).backbone, cut, training)  # says now what cannot be met
    recipe = {"detector": detector_digest(folder), "prune": cut.model_dump(), "training": training.model_dump()}
    with open_run(out, recipe, _IDENTITY):
        artifacts = _cut_stages(folder, dense, info, cut, training, out, data, quiet)
        if fine_tune:
            artifacts["3-train"] = _train_stage(folder, artifacts["2-prune"], cut, training, data, quiet)
    return artifacts


def _schedule(info: DetectorInfo, cut: PruneRecipe, given: DetectRecipe) -> DetectRecipe:
    """Fine-tuning: images of the size that the detector was trained with, a part of the epochs, smaller steps."""
    usual = resolved(given)
    check_detection(usual)
    kinds = info.config["type"], info.config["backbone"]["type"]
    if kinds != ("RetinaNet", "UPPVTv2"):
        raise UserError(
            f"A {kinds[0]} on {kinds[1]} cannot be pruned.", fix="RetinaNet on a PVTv2 can: see `detect train`."
        )
    if given.imitation and cut.head_ratio:
        raise UserError(
            "--imitation and --head-ratio exclude each other.",
            why="The features of a narrower pyramid are other ones.",
            fix="Leave one of them out.",
        )
    assert usual.epochs is not None
    assert usual.lr is not None
    filled = {
        "scale": given.scale or info.scale,
        "size": given.size or size_for(info.scale),
        "epochs": given.epochs or max(1, round(EPOCHS * usual.epochs)),
        "lr": given.lr or LR * usual.lr,
    }
    return usual.model_copy(update=filled)


def _cut_stages(
    folder: Path,
    dense: nn.Module,
    info: DetectorInfo,
    cut: PruneRecipe,
    training: DetectRecipe,
    out: Path,
    data: CocoData,
    quiet: bool,
) -> dict[str, Artifact]:
    """The dense detector judged, scores, and the cut detector judged."""
    size, device = size_of(training), pick_device("auto")

    def judge_dense(place: Path) -> None:
        shutil.copytree(folder, place / "detector")
        judge_detector(place, data, size, export=False, quiet=quiet)

    def score(place: Path) -> None:
        if cut.task == "random":
            scores = _random_scores(dense, cut)
        else:
            images = _training_images(data, info, size, cut.images)
            scores = score_detector(dense.to(device), images, seed=cut.seed, quiet=quiet)
        scores.backbone.save(place)
        save_tensors(scores.neck_and_head, place / _CHANNEL_SCORES)

    def prune(place: Path) -> None:
        scores = DetectorScores(Scores.load(scored.folder), load_file(scored.folder / _CHANNEL_SCORES))
        plan = _plan(dense, scores.backbone, cut, training)
        (place / "plan.json").write_text(plan.to_json())
        kept = kept_channels(dense, scores, cut.head_ratio, cut.align)
        images = _training_images(data, info, size, cut.images)
        pruned = cut_detector(dense.to(device), info, plan, kept, images, compensate=cut.compensate, quiet=quiet)
        save_detector(pruned.detector, pruned.info, place / "detector")
        write_json(place / "surgery.json", {
            "divergence_cut": pruned.divergence_cut, "divergence": pruned.divergence, "refitted": pruned.refitted,
            "kept": kept,
        })  # fmt: skip
        judge_detector(place, data, size, quiet=quiet)

    inputs = {"detector": detector_digest(folder), "coco": data.digest}
    judging: dict[str, Any] = {"size": training.size}
    scoring = judging | cut.model_dump(include={"task", "images", "seed"})
    judged = _stage(out, "0-dense", judging, inputs, judge_dense)
    scored = _stage(out, "1-score", scoring, inputs, score)
    pruned = _stage(out, "2-prune", cut.model_dump() | judging, {**inputs, "scores": scored.digest}, prune)
    dense.cpu()  # leaves the GPU to the training
    return {"0-dense": judged, "1-score": scored, "2-prune": pruned}


def _train_stage(
    folder: Path, pruned: Artifact, cut: PruneRecipe, training: DetectRecipe, data: CocoData, quiet: bool
) -> Artifact:
    """The cut detector fine-tuned and judged."""
    start = pruned.folder / "detector"

    def train(place: Path) -> None:
        train_into(
            place, read_info(start).config, data, training, seed=cut.seed, start=start,
            teacher=folder if training.imitation else None, quiet=quiet,
        )  # fmt: skip
        judge_detector(place, data, size_of(training), quiet=quiet)

    settings = training.model_dump(mode="json", exclude={"workers", "tensorboard", "coco", "batches", "ap_images"})
    inputs = {"pruned": pruned.digest, "coco": data.digest}
    return _stage(pruned.folder.parent, "3-train", settings, inputs, train, resumable=True)


def _stage(
    out: Path, name: str, settings: Mapping[str, object], inputs: Mapping[str, str], work: Callable[[Path], None],
    *, resumable: bool = False,
) -> Artifact:  # fmt: skip
    artifact = run_stage(out, name, settings, inputs, work, version=VERSION, resumable=resumable)
    announce(name, artifact)
    return artifact


def _plan(detector: nn.Module, scores: Scores, cut: PruneRecipe, training: DetectRecipe) -> PruningPlan:
    """For the backbone; nothing leaves it where only pyramid and head are asked for."""
    return toolchain.plan(
        detector.get_submodule("backbone.net"),
        scores,
        ratio=0.0 if cut.target_macs is None and cut.ratio is None else cut.ratio,
        target_macs=cut.target_macs,
        planner=cut.planner,
        align=cut.align,
        input_size=(3, *size_of(training)),
    )


def _training_images(data: CocoData, info: DetectorInfo, size: tuple[int, int], most: int) -> Tensor:
    """Training images [N, 3, H, W] as the detector takes them; their boxes are not looked at."""
    return torch.stack([image.pixels for image in fitted(data.train, info.preprocess(size), most)])


def _random_scores(detector: nn.Module, cut: PruneRecipe) -> DetectorScores:
    """Scores that mean nothing, to compare with."""
    generator = torch.Generator().manual_seed(cut.seed)
    channels = {group.name: torch.rand(group.size, generator=generator).double() for group in conv_groups(detector)}
    net = detector.get_submodule("backbone.net")
    return DetectorScores(toolchain.score(net, method="random", seed=cut.seed), channels)
