"""What is asked of a detector: one document, part of a run's recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.validation import validated
from upvits.detection.configs import Detector, Schedule

Backbones = Literal["both", "dense", "pruned"]


class DetectRecipe(BaseModel):
    """A detector on the networks of a run, trained on a data set in COCO's format; None is resolved from the data.

    `scale` is the largest (long, short) side in pixels; `size` the (height, width) that it is exported for, `imitation`
    the weight of the dense detector's features in the training of the pruned one. Latency is measured at `batches`, AP
    of engines on `ap_images` validation images at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    coco: str = "demo"
    detector: Detector = "retinanet"
    backbones: Backbones = "both"
    epochs: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    scale: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    fpn_channels: int | None = Field(None, ge=8)
    stacked_convs: int | None = Field(None, ge=1)
    warmup: int | None = Field(None, ge=1)
    grad_clip: float | None = Field(None, gt=0)
    workers: int | None = Field(None, ge=0)
    amp: bool = False
    tensorboard: bool = False
    imitation: float = Field(0.0, ge=0)
    cfg_options: dict[str, Any] = {}
    batches: tuple[Annotated[int, Field(ge=1, le=64)], ...] = (1,)
    ap_images: int = Field(500, ge=1)


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
"""So much larger than in training may images be that a detector is judged on."""


def make_detect_recipe(values: dict[str, Any]) -> DetectRecipe:
    """Validate plain values.

    Raises:
        UserError: a value is out of range, of the wrong type, or unknown.
    """
    return validated(DetectRecipe, values, "This cannot be done", "upvits-deploy detect train")


def resolved(recipe: DetectRecipe) -> DetectRecipe:
    """Every value filled in: the short schedule on the demo, the published one on all else."""
    known = SHORT if recipe.coco == "demo" else PUBLISHED
    filled = {name: value for name, value in known.items() if getattr(recipe, name) is None}
    filled["coco"] = place_of(recipe.coco)
    found = recipe.model_copy(update=filled)
    assert found.scale is not None
    if any(_rounded(side) > _CLOSE * side for side in found.scale):
        raise UserError(
            f"--scale {found.scale[0]}x{found.scale[1]} does not fit.",
            why="Detectors take sides that are multiples of 32, and have to see objects as large as in their training.",
            fix=f"Give multiples of 32, e.g. {_rounded(found.scale[0])}x{_rounded(found.scale[1])}; 1333x800 is near "
            "enough.",
        )
    if found.size is not None and (found.size[0] % 32 or found.size[1] % 32):
        raise UserError(f"Images of {found.size[0]} x {found.size[1]} pixels do not fit.", fix="Give multiples of 32.")
    if found.size is None:
        found = found.model_copy(update={"size": size_for(found.scale)})
    return found


def place_of(coco: str) -> str:
    """A folder by its full name, however it was spelled; `demo` as it is."""
    return coco if coco == "demo" else str(Path(coco).expanduser().resolve())


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
    names = (
        "epochs",
        "batch_size",
        "lr",
        "weight_decay",
        "scale",
        "warmup",
        "workers",
        "amp",
        "tensorboard",
        "grad_clip",
    )
    return Schedule(**{name: getattr(recipe, name) for name in names})
