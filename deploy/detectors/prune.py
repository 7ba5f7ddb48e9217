"""A trained detector pruned directly: scored by its own maps, cut with pyramid and head, refitted, fine-tuned."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.detectors.flow import check_request, open_data
from upvits.deploy.detectors.train_stage import detector_digest, images_of, judged, tidy, train_into
from upvits.deploy.recipe.detect import DetectRecipe, PruneRecipe, resolved, size_for, size_of
from upvits.deploy.stages.job import announce, write_json
from upvits.deploy.store.artifacts import Artifact, run_stage
from upvits.deploy.store.run_dir import open_run
from upvits.detection.coco import CocoData
from upvits.detection.detector import DetectorInfo, load_detector, read_info, save_detector
from upvits.detection.detector_scores import DetectorScores, conv_groups, score_detector
from upvits.detection.detector_surgery import cut_detector, kept_channels
from upvits.detection.training import train_along
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.scores import Scores
from upvits.toolchain.training.crew import Crew, gathered
from upvits.toolchain.training.processes import pick_device

VERSION = 2
EPOCHS, LR = 0.4, 0.3
"""Shares of the usual schedule for fine-tuning. On the drawn scenes, 3 epochs at 0.1, 0.3 and 1 of the rate brought a
refitted detector from AP 72.4 to 80.0, 80.4 and 80.1 (dense 82.3; one seed each): it matters little."""
_IDENTITY = ("detector", "prune")


def prune_detector(
    folder: Path, wanted: PruneRecipe, training: DetectRecipe, out: Path, *, fine_tune: bool = True, quiet: bool = True
) -> dict[str, Artifact]:
    """Prune a detector, or continue: `0-dense`, `1-score`, `2-prune` and `3-train` in a folder.

    Args:
        folder: of the detector.
        wanted: what is cut.
        training: data and schedule of the fine-tuning.
        out: a run directory of its own.
        fine_tune: train after the cut.
        quiet: no progress bars.

    Returns:
        Artifacts by name of the stage.

    Raises:
        UserError: it is no RetinaNet with a timm backbone, or the request cannot be met.
        MissingDependencyError: mmdet is not there.
    """
    training = _schedule(folder, wanted, training)
    info = read_info(folder)
    with gathered() as crew:
        if not crew.is_leader:
            train_along(crew)
            return {}
        data = open_data(training.coco, quiet=quiet)
        if info.classes != data.classes:
            raise UserError(
                f"{folder} knows other categories than {training.coco}.", fix="Give the data it was trained on."
            )
        detector = load_detector(folder)[0]
        _plan(detector, _random(detector, wanted).backbone, wanted, training)  # says now what cannot be met
        recipe = {"detector": detector_digest(folder), "prune": wanted.model_dump(),
                  "training": training.model_dump()}  # fmt: skip
        with open_run(out, recipe, _IDENTITY):
            cut = _cut_stages(folder, info, wanted, training, out, data, quiet)
            return cut | (
                _train_stage(folder, cut["2-prune"], wanted, training, data, crew, quiet) if fine_tune else {}
            )


def _schedule(folder: Path, cut: PruneRecipe, wanted: DetectRecipe) -> DetectRecipe:
    """Fine-tuning: images of the size that the detector was trained with, a part of the epochs, smaller steps."""
    usual = resolved(wanted)
    check_request(usual)
    info = read_info(folder)
    kinds = info.config["type"], info.config["backbone"]["type"]
    if kinds != ("RetinaNet", "UPPVTv2"):
        raise UserError(
            f"A {kinds[0]} on {kinds[1]} cannot be pruned.", fix="RetinaNet on a PVTv2 can: see `detect train`."
        )
    if wanted.imitation and cut.head_ratio:
        raise UserError(
            "--imitation and --head-ratio exclude each other.",
            why="The features of a narrower pyramid are other ones.",
            fix="Leave one of them out.",
        )
    assert usual.epochs is not None
    assert usual.lr is not None
    filled = {
        "scale": wanted.scale or info.scale,
        "size": wanted.size or size_for(info.scale),
        "epochs": wanted.epochs or max(1, round(EPOCHS * usual.epochs)),
        "lr": wanted.lr or LR * usual.lr,
    }
    return usual.model_copy(update=filled)


def _cut_stages(
    folder: Path,
    info: DetectorInfo,
    wanted: PruneRecipe,
    training: DetectRecipe,
    out: Path,
    data: CocoData,
    quiet: bool,
) -> dict[str, Artifact]:
    """The dense detector judged, scores, and the cut detector judged."""
    source = {"detector": detector_digest(folder), "coco": data.digest}
    cutting = wanted.model_dump()

    def dense(place: Path) -> None:
        shutil.copytree(folder, place / "detector")
        judged(place, data, training, quiet=quiet, export=False)

    def score(place: Path) -> None:
        detector = load_detector(folder)[0].to(pick_device("auto"))
        images = _images(data, info, training, wanted.images)
        chosen = wanted.task == "detection"
        scores = (
            score_detector(detector, images, seed=wanted.seed, quiet=quiet) if chosen else _random(detector, wanted)
        )
        scores.backbone.save(place)
        save_file(scores.neck_and_head, place / "neck_and_head.safetensors")

    def cut(place: Path) -> None:
        detector = load_detector(folder)[0].to(pick_device("auto"))
        scores = DetectorScores(Scores.load(scored.folder), load_file(scored.folder / "neck_and_head.safetensors"))
        plan = _plan(detector, scores.backbone, wanted, training)
        (place / "plan.json").write_text(plan.to_json())
        kept = kept_channels(detector, scores, wanted.head_ratio, wanted.align)
        images = _images(data, info, training, wanted.images)
        found = cut_detector(detector, info, plan, kept, images, compensate=wanted.compensate, quiet=quiet)
        save_detector(found.detector, found.info, place / "detector")
        write_json(place / "surgery.json", {
            "divergence_cut": found.divergence_cut, "divergence": found.divergence, "refitted": found.refitted,
            "kept": kept,
        })  # fmt: skip
        judged(place, data, training, quiet=quiet)

    judging = {"size": training.size}
    before = _stage(out, "0-dense", judging, source, dense, quiet)
    scored = _stage(
        out, "1-score", judging | {key: cutting[key] for key in ("task", "images", "seed")}, source, score, quiet
    )
    pruned = _stage(out, "2-prune", cutting | judging, {**source, "scores": scored.digest}, cut, quiet)
    return {"0-dense": before, "1-score": scored, "2-prune": pruned}


def _train_stage(
    folder: Path, pruned: Artifact, wanted: PruneRecipe, training: DetectRecipe, data: CocoData, crew: Crew, quiet: bool
) -> dict[str, Artifact]:
    """The cut detector fine-tuned and judged."""

    def train(place: Path) -> None:
        if not (place / "detector").exists():
            start = pruned.folder / "detector"
            train_into(
                place, read_info(start).config, data, training, seed=wanted.seed, crew=crew, start=start,
                teacher=folder if training.imitation else None, quiet=quiet,
            )  # fmt: skip
        tidy(place)
        judged(place, data, training, quiet=quiet)

    settings = training.model_dump(mode="json", exclude={"workers", "tensorboard", "coco", "batches", "ap_images"})
    inputs = {"pruned": pruned.digest, "coco": data.digest}
    return {"3-train": _stage(pruned.folder.parent, "3-train", settings, inputs, train, quiet, resumable=True)}


def _stage(
    out: Path, name: str, settings: Mapping[str, object], inputs: Mapping[str, str], work: Callable[[Path], None],
    quiet: bool, *, resumable: bool = False,
) -> Artifact:  # fmt: skip
    artifact = run_stage(out, name, settings, inputs, work, version=VERSION, resumable=resumable)
    announce(name, artifact, quiet=quiet)
    return artifact


def _plan(detector: nn.Module, scores: Scores, wanted: PruneRecipe, training: DetectRecipe) -> PruningPlan:
    """For the backbone; nothing leaves it where only pyramid and head are asked for."""
    return toolchain.plan(
        detector.get_submodule("backbone.net"),
        scores,
        ratio=0.0 if wanted.target_macs is None and wanted.ratio is None else wanted.ratio,
        target_macs=wanted.target_macs,
        planner=wanted.planner,
        align=wanted.align,
        input_size=(3, *size_of(training)),
    )


def _images(data: CocoData, info: DetectorInfo, training: DetectRecipe, most: int) -> Tensor:
    """Training images [N, 3, H, W] as the detector takes them; their boxes are not looked at."""
    return torch.stack([one.pixels for one in images_of(data.train, info, training, most)])


def _random(detector: nn.Module, wanted: PruneRecipe) -> DetectorScores:
    """Scores that mean nothing, to compare with."""
    generator = torch.Generator().manual_seed(wanted.seed)
    channels = {group.name: torch.rand(group.size, generator=generator).double() for group in conv_groups(detector)}
    net = detector.get_submodule("backbone.net")
    return DetectorScores(toolchain.score(net, method="random", seed=wanted.seed), channels)
