"""The recipe: everything that decides a result, in one document that is written next to the results.

A command line (or a TOML file) gives a few values; `resolve` in `deploy/recipe/request.py` fills in the others from the
model and the data. What is written to `recipe.toml` is the resolved recipe: running it again gives the same result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from upvits.deploy.choices import MAX_STREAMS
from upvits.deploy.recipe.detect import DetectRecipe
from upvits.deploy.recipe.validation import validated
from upvits.deploy.store.run_dir import read_recipe, read_toml
from upvits.toolchain.planning import Component
from upvits.toolchain.scores import Method

Planner = Literal["uniform", "global", "latency"]
IDENTITY = ("model", "weights", "data", "image_size", "plan")
"""What makes a run this run: another value belongs into another directory."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScoreRecipe(_Part):
    """How units are scored: on `num_images` training images, equally many of every class."""

    method: Method = "fisher"
    num_images: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)


class PlanRecipe(_Part):
    """How much is cut, exactly one of the first six (`depth_ratio` may stand alone or beside `ratio`), and by whom.

    `target_latency` ("2.0ms") and `speedup` ("2x") are measured on the first runtime of the run that works here, at the
    first batch size that is timed.
    """

    ratio: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    like: str | None = None
    target_latency: str | None = None
    speedup: str | None = None
    depth_ratio: float | None = None
    planner: Planner | None = None
    rounds: int = Field(1, ge=1, le=64)
    align: int = 8
    components: tuple[Component, ...] | None = None


class CompensateRecipe(_Part):
    """Closed-form compensation of the cut on unlabelled training images: rotation and refit.

    `enabled` None means: unless there are too few images for it.
    """

    enabled: bool | None = None
    refit_images: int | None = Field(None, ge=1)


class DistillRecipe(_Part):
    """Fine-tuning against the dense parent; what is None is resolved from the model and the data."""

    epochs: int | None = Field(None, ge=0)
    batch_size: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(1e-3, ge=0)
    warmup_epochs: float | None = Field(None, ge=0)
    cutmix: float | None = Field(None, ge=0)
    drop_path: float | None = Field(None, ge=0, lt=1)
    label_weight: float = Field(1.0, ge=0)
    logit_weight: float = Field(6.4, ge=0)
    feature_weight: float | None = Field(None, ge=0)
    workers: int | None = Field(None, ge=0)


class ExportRecipe(_Part):
    """How the ONNX files are written, and on how many validation images graphs and engines are judged."""

    opset: int = Field(20, ge=18, le=23)
    uint8_input: bool = False
    external_data: bool = False
    parity_images: int = Field(64, ge=1)
    accuracy_images: int = Field(1000, ge=1)


class PrecisionRecipe(_Part):
    """What quantization is calibrated on, and what a precision may cost.

    `calib` is a data spec (None: the training images of `data`), `max_drop` the largest loss of top-1 against fp32 in
    points (of agreement with it where there are no labels).
    """

    calib: str | None = None
    calib_images: int = Field(256, ge=1)
    max_drop: float = Field(0.5, ge=0)


class EngineRecipe(_Part):
    """What is built: every runtime in every precision that it has."""

    runtime: str = "auto"
    precision: str = "auto"
    batch: str = "1:8:32"
    targets: tuple[str, ...] = ()
    workspace_mib: int | None = Field(None, ge=1)
    require_fused_attention: bool = False


class BenchRecipe(_Part):
    """How latency is measured; `seconds` is the time per batch size for each pair of dense and pruned engines."""

    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 8)
    seconds: float = Field(6.0, gt=0)
    warmup: int = Field(5, ge=1)
    rounds: int = Field(20, ge=2)
    streams: tuple[Annotated[int, Field(ge=1, le=MAX_STREAMS)], ...] = (1,)
    cuda_graph: bool = False


class Recipe(_Part):
    """One run of the main job."""

    model: str
    weights: str | None = None
    data: str = "demo"
    image_size: int | None = Field(None, ge=16, le=4096)
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    score: ScoreRecipe = ScoreRecipe()
    plan: PlanRecipe = PlanRecipe()
    compensate: CompensateRecipe = CompensateRecipe()
    distill: DistillRecipe = DistillRecipe()
    export: ExportRecipe = ExportRecipe()
    precision: PrecisionRecipe = PrecisionRecipe()
    engine: EngineRecipe = EngineRecipe()
    bench: BenchRecipe = BenchRecipe()
    detect: DetectRecipe | None = None


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Validate plain values.

    Raises:
        UserError: a value is out of range, of the wrong type, or unknown.
    """
    return validated(Recipe, values, "The recipe is not valid", "upvits-deploy build")


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Values of a recipe in TOML: a file, or the run directory that holds one."""
    return read_recipe(path) if path.is_dir() else read_toml(path)


def split_names(spec: str) -> list[str]:
    """Names in a list separated by commas."""
    return [name.strip() for name in spec.split(",") if name.strip()]
