"""What is asked of a detector: one document, part of a run's recipe."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.deploy.recipe.setting import setting
from upvits.deploy.recipe.validation import validated
from upvits.detection.configs import LARGEST_SIDE, Detector, Schedule
from upvits.toolchain.choices import Planner

Backbones = Literal["both", "dense", "pruned"]
Task = Literal["detection", "random"]


class DetectRecipe(BaseModel):
    """A detector on the networks of a run, trained on a data set in COCO's format; None is resolved from the data.

    `scale` is the largest (long, short) side in pixels; `size` the (height, width) that it is exported for, `imitation`
    the weight of the dense detector's features in the training of the pruned one. Latency is measured at `batches`, AP
    of engines on `ap_images` validation images at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    coco: str = setting("demo", "Folder in COCO's format, TRAIN.json,VAL.json, or demo.", "--coco")
    detector: Detector = setting("retinanet", "What is built on the network.", "--detector")
    backbones: Backbones = setting("both", "Networks that get a detector.", "--backbones")
    epochs: int | None = setting(
        None, "Passes over the training images.", "--epochs", shown="8 on the demo, else 12", ge=1, le=100_000
    )
    batch_size: int | None = setting(
        None, "Images per step and process.", "--batch-size", shown="8 on the demo, else 2", ge=1, le=65_536
    )
    lr: float | None = setting(
        None, "Peak rate for 16 images a step.", "--lr", shown="2e-3 on the demo, else 1e-4", gt=0, le=1e6
    )
    weight_decay: float | None = setting(None, "Of AdamW.", shown="1e-2 on the demo, else 1e-4", ge=0, le=1e6)
    scale: tuple[int, int] | None = setting(
        None, "Largest sides in pixels, e.g. 1333x800.", "--scale", shown="128x128 on the demo, else 1333x800"
    )
    size: tuple[int, int] | None = setting(
        None, "(height, width) that is exported, multiples of 32.", shown="what images of `scale` fit into"
    )
    fpn_channels: int | None = setting(
        None, "Width of pyramid and head.", "--fpn-channels", shown="96 on the demo, else 256", ge=8, le=8_192
    )
    stacked_convs: int | None = setting(
        None, "Convolutions of each branch of the head.", "--stacked-convs", shown="2 on the demo, else 4", ge=1, le=64
    )
    warmup: int | None = setting(None, "Steps with a rising rate.", shown="50 on the demo, else 500", ge=1, le=10**9)
    grad_clip: float | None = setting(
        None, "Largest norm of all gradients.", shown="10 on the demo, else none", gt=0, le=1e9
    )
    workers: int | None = setting(
        None, "Reading processes.", "--workers", shown="0 on the demo, else 2", ge=0, le=1_024
    )
    amp: bool = setting(False, "Mixed precision.", "--amp")
    tensorboard: bool = setting(False, "Write curves for it.", "--tensorboard")
    imitation: float = setting(0.0, "Weight of the dense detector's features.", "--imitation", ge=0, le=1e6)
    cfg_options: dict[str, Any] = setting({}, "key=value of mmdet's configuration; may be repeated.", "--cfg-options")
    batches: tuple[Annotated[int, Field(ge=1, le=64)], ...] = setting((1,), "Batch sizes to time.", "--bench-batches")
    ap_images: int = setting(500, "Validation images that engines are judged on.", "--ap-images", ge=1)


class PruneRecipe(BaseModel):
    """What is cut from a detector.

    `ratio` or `target_macs` are for the backbone, as in the main job; `head_ratio` is the share of the channels of
    pyramid and head that leave. `task` says what the scores are: KL of the class maps and deviation of boxes
    (`detection`), or `random`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ratio: float | None = setting(None, "Share of every dimension to remove.", "--ratio", "-r", ge=0, lt=1)
    target_macs: float | None = setting(None, "Share of the MACs to keep.", "--target-macs", gt=0, lt=1)
    head_ratio: float = setting(0.0, "Share of the channels of pyramid and head to remove.", "--head-ratio", ge=0, lt=1)
    planner: Planner = setting("uniform", "What chooses widths.", "--planner")
    task: Task = setting("detection", "Scores: of class maps and boxes, or random.", "--task")
    images: int = setting(128, "Unlabelled images to score and refit on.", "--images", ge=10)
    compensate: bool = setting(True, "Rotate and refit.", "--compensate/--no-compensate")
    align: int = setting(8, "Widths are multiples of this.", ge=1)
    seed: int = setting(0, "Of everything that is drawn.", ge=0)

    @model_validator(mode="after")
    def _one_target(self) -> PruneRecipe:
        if self.ratio is not None and self.target_macs is not None:
            raise ValueError("give ratio or target_macs, not both")
        if self.ratio is None and self.target_macs is None and not self.head_ratio:
            raise ValueError("give ratio or target_macs for the backbone, or head_ratio for pyramid and head")
        return self


PUBLISHED = {
    "epochs": 12, "batch_size": 2, "lr": 1e-4, "weight_decay": 1e-4, "scale": (1333, 800), "fpn_channels": 256,
    "stacked_convs": 4, "warmup": 500, "workers": 2,
}  # fmt: skip
"""The 1x schedule (PVTv2, arXiv 2106.13797, section 4.2)."""

SHORT = {
    "epochs": 8, "batch_size": 8, "lr": 2e-3, "weight_decay": 1e-2, "scale": (128, 128), "fpn_channels": 96,
    "stacked_convs": 2, "warmup": 50, "workers": 0,
    "grad_clip": 10.0,
}  # fmt: skip
"""For the drawn scenes: minutes on a CPU. `lr` is for 16 images per step, like the other."""


_CLOSE = 1.02
"""Images that a detector is judged on may be larger than in its training by this factor, at most."""


def make_detect_recipe(values: dict[str, Any]) -> DetectRecipe:
    """A recipe of plain values.

    Raises:
        UserError: a value is out of range, of the wrong type, or unknown.
    """
    return validated(DetectRecipe, values, "upvits-deploy detect train")


def make_prune_recipe(values: dict[str, Any]) -> PruneRecipe:
    """A recipe of plain values.

    Raises:
        UserError: a value is out of range, of the wrong type, or unknown.
    """
    return validated(PruneRecipe, values, "upvits-deploy detect prune")


def resolved(recipe: DetectRecipe) -> DetectRecipe:
    """Fill in what was not given: the short schedule on the demo, the published one on other data.

    Raises:
        UserError: `scale` or `size` does not suit sides that are multiples of 32.
    """
    known = SHORT if recipe.coco == "demo" else PUBLISHED
    filled: dict[str, Any] = {name: value for name, value in known.items() if getattr(recipe, name) is None}
    filled["coco"] = place_of(recipe.coco)
    scale, size = recipe.scale or filled["scale"], recipe.size
    if any(_rounded(side) > _CLOSE * side for side in scale):
        raise UserError(
            f"--scale {scale[0]}x{scale[1]} does not fit.",
            why="Detectors take sides that are multiples of 32, and have to see objects as large as in their training.",
            fix=f"Give multiples of 32, e.g. {_rounded(scale[0])}x{_rounded(scale[1])}; 1333x800 is near enough.",
        )
    if max(*scale, *(size or (1,))) > LARGEST_SIDE:
        raise UserError(
            f"A side of {max(*scale, *(size or (1,))):,} pixels is too large.",
            why="What a detector makes of such images fills any memory.",
            fix=f"Give --scale with at most {LARGEST_SIDE:,} pixels a side.",
        )
    if size is not None and (size[0] % 32 or size[1] % 32):
        raise UserError(f"Images of {size[0]} x {size[1]} pixels do not fit.", fix="Give multiples of 32.")
    return recipe.model_copy(update={**filled, "size": size or size_for(scale)})


def place_of(coco: str) -> str:
    """A folder, or one or two files of annotations, by their full names, however spelled; `demo` as it is."""
    return coco if coco == "demo" else ",".join(str(place) for place in places_of(coco))


def places_of(coco: str) -> list[Path]:
    """The folder of a data set, or the files `TRAIN.json,VAL.json`; a folder may have a comma in its name."""
    parts = coco.split(",")
    files = len(parts) <= 2 and all(part.lower().endswith(".json") for part in parts)
    return [user_path(part).resolve() for part in (parts if files else [coco])]


def size_for(scale: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that images fit into which are scaled to (long, short): multiples of 32."""
    long, short = max(scale), min(scale)
    return _rounded(short), _rounded(long)


def _rounded(side: int) -> int:
    return -(-side // 32) * 32


def size_of(recipe: DetectRecipe) -> tuple[int, int]:
    """(height, width) in pixels of a resolved recipe."""
    assert recipe.size is not None
    return recipe.size


def schedule_of(recipe: DetectRecipe) -> Schedule:
    """The schedule of a resolved recipe."""
    return Schedule(**{field.name: getattr(recipe, field.name) for field in fields(Schedule)})
