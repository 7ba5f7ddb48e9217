"""The recipe: everything that decides a result, in one document that is written next to the results.

A command line (or a TOML file) gives a few values; `resolve` in `deploy/recipe/request.py` fills in the others from the
model and the data. What is written to `recipe.toml` is the resolved recipe: running it again gives the same result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from upvits.calib_data.choices import Order
from upvits.calib_data.files import user_path
from upvits.deploy.choices import MAX_STREAMS
from upvits.deploy.recipe.detect import DetectRecipe
from upvits.deploy.recipe.setting import BENCH, ENGINE, INPUT, PLAN, REQUIRED, RUN, TRAIN, setting
from upvits.deploy.recipe.validation import validated
from upvits.deploy.recipe.values import Batch, GpuTarget, ImageSize, ModelArgs, Precisions, Speedup, TargetLatency
from upvits.deploy.speed.target import Target
from upvits.toolchain.choices import Amp, Component, Interpolation, Method, Optimizer

Planner = Literal["uniform", "global", "latency"]
CUTS = ("ratio", "target_macs", "target_params", "like", "target_latency", "speedup")
"""Fields of a plan of which a run has one; a sweep has several of one."""

PREPROCESS = ("image_size", "mean", "std", "crop_pct", "interpolation")
"""Fields that say how images are prepared."""

IDENTITY = (
    "model", "weights", "data", "class_map", "class_order", "image_key", "image_column", "label_column", *PREPROCESS,
    "model_args", "plan",
)  # fmt: skip
"""What makes a run this run: another value belongs into another directory."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class PlanRecipe(_Part):
    """How much is cut, exactly one of the first six (`depth_ratio` may stand alone or beside `ratio`), and by whom.

    `target_latency` ("2.0ms") and `speedup` ("2x") are measured on the first runtime of the run that works here, at the
    first batch size that is timed.
    """

    ratio: float | None = setting(None, "Share of every dimension to remove.", "--ratio", "-r", panel=PLAN)
    target_macs: float | None = setting(None, "Share of the MACs to keep.", "--target-macs", panel=PLAN)
    target_params: float | None = setting(None, "Share of the parameters to keep.", "--target-params", panel=PLAN)
    like: str | None = setting(None, "Depth, widths and heads of this smaller published model.", "--like", panel=PLAN)
    target_latency: TargetLatency | None = setting(
        None, "Milliseconds per batch, e.g. 2.0ms, measured here.", "--target-latency", panel=PLAN
    )
    speedup: Speedup | None = setting(None, "Against the dense model, e.g. 2x, measured here.", "--speedup", panel=PLAN)
    depth_ratio: float | None = setting(
        None, "Share of the blocks to remove, also beside --ratio; planner uniform.", "--depth-ratio", panel=PLAN
    )
    planner: Planner | None = setting(
        None, "What chooses widths.", "--planner", panel=PLAN, shown="uniform; latency where one is asked for"
    )
    rounds: int = setting(1, "Prune in steps, scoring again in between.", "--rounds", panel=PLAN, ge=1, le=64)
    align: int = setting(8, "Widths are multiples of this.", "--align", panel=PLAN)
    components: tuple[Component, ...] | None = setting(
        None,
        "What may be cut: of attention, heads and qk_v one; depth not with planner uniform.",
        "--components",
        panel=PLAN,
        shown="embed,attention,ffn, and depth unless uniform",
    )

    @property
    def latency(self) -> Target | None:
        """The latency that is aimed at, where one is."""
        return self.target_latency or self.speedup


class ScoreRecipe(_Part):
    """How units are scored: on `num_images` training images, equally many of every class."""

    method: Method = setting("fisher", "How units are scored.", "--method", panel=PLAN)
    num_images: int | None = setting(
        None, "Images to score on.", "--proxy-images", panel=PLAN, shown="1024; 256 on the demo", ge=1
    )
    batch_size: int = setting(8, "Images per step of scoring.", ge=1)


class CompensateRecipe(_Part):
    """Closed-form compensation of the cut on unlabelled training images: rotation and refit.

    `enabled` None means: unless there are too few images for it.
    """

    enabled: bool | None = setting(
        None, "Rotate and refit.", "--compensate/--no-compensate", panel=PLAN, shown="on with enough images"
    )
    refit_images: int | None = setting(None, "Images to refit on.", "--refit-images", panel=PLAN, shown="512", ge=1)


class DistillRecipe(_Part):
    """Fine-tuning against the dense parent; what is None comes from `train_recipe`, or is resolved from the model and
    the data. Settings without an option on the command line can stand in a file for `--train-recipe`.

    `finetuned` names weights of the pruned network that were trained elsewhere: nothing is then trained here.
    """

    train_recipe: str | None = setting(
        None,
        "up (the paper's), modern, short, or a TOML file with settings of this table.",
        "--train-recipe",
        panel=TRAIN,
        shown="short: what suits the data",
    )
    teacher: str | None = setting(
        None,
        "Who teaches: a model folder, NAME=FILE with timm's name, or such a name.",
        "--teacher",
        panel=TRAIN,
        shown="the dense network",
    )
    finetuned: str | None = setting(
        None,
        "Weights of the pruned network, trained elsewhere: folder or file.",
        "--finetuned",
        panel=TRAIN,
        shown="none",
    )

    epochs: int | None = setting(
        None,
        "Passes over the training images; 0 skips.",
        "--epochs",
        panel=TRAIN,
        shown="30; on the demo 2, or 3 with --no-compensate",
        ge=0,
        le=100_000,
    )
    batch_size: int | None = setting(
        None, "Images per step.", "--batch-size", panel=TRAIN, shown="256; 32 below 20,000 images", ge=1
    )
    accumulation: int | None = setting(
        None,
        "Passes per step, each with a part of the images.",
        "--accumulation",
        panel=TRAIN,
        shown="1",
        ge=1,
    )
    optimizer: Optimizer | None = setting(None, "What changes the weights, of timm.", shown="adamw")
    lr: float | None = setting(
        None,
        "Peak rate at batch 256.",
        "--lr",
        panel=TRAIN,
        shown="1e-3; 4e-3 below 20,000 images; on the demo 3e-3, or 12e-3 with --no-compensate",
        gt=0,
    )
    layer_decay: float | None = setting(
        None, "Factor of the rate from each layer to the one before it.", shown="1", gt=0, le=1
    )
    weight_decay: float | None = setting(
        None, "None on biases, norms, tokens and position embedding.", shown="1e-3", ge=0
    )
    warmup_epochs: float | None = setting(None, "Epochs of a rising rate.", shown="2; 0.3 on the demo", ge=0)
    cutmix: float | None = setting(
        None,
        "CutMix, shares from Beta(cutmix, cutmix); 0: none.",
        shown="0.5; 0 on the demo",
        ge=0,
    )
    mixup: float | None = setting(None, "Mixup, shares from Beta(mixup, mixup); 0: none.", shown="0", ge=0)
    mix_prob: float | None = setting(None, "Share of the batches that are mixed.", shown="1", ge=0, le=1)
    label_smoothing: float | None = setting(None, "Share of a label that goes to all classes.", shown="0", ge=0, lt=1)
    min_crop: float | None = setting(None, "Smallest share of an image in a crop.", shown="0.5", gt=0, le=1)
    auto_augment: str | None = setting(
        None, "rand-m9-mstd0.5-inc1 (RandAugment), 3a (3-Augment), ... as timm says it, or none.", shown="none"
    )
    color_jitter: float | None = setting(None, "Largest change of colours.", shown="0", ge=0, le=1)
    random_erasing: float | None = setting(
        None, "Share of the images in which a box is replaced by noise.", shown="0", ge=0, le=1
    )
    repeated_augmentation: int | None = setting(
        None, "Views of an image in an epoch, which has as many fewer images.", shown="1", ge=1
    )
    drop_path: float | None = setting(
        None,
        "Stochastic depth of the last block, growing linearly.",
        shown="0.1; 0 below 20,000 images",
        ge=0,
        lt=1,
    )
    label_weight: float | None = setting(None, "Weight of the labels' loss.", shown="1", ge=0)
    logit_weight: float | None = setting(None, "Weight of the KL to the teacher's logits.", shown="6.4", ge=0)
    temperature: float | None = setting(None, "Of the logits in that KL.", shown="1", gt=0)
    hard_weight: float | None = setting(None, "Weight of the teacher's first class as a label.", shown="0", ge=0)
    feature_weight: float | None = setting(
        None,
        "Weight of feature distillation.",
        "--feature-weight",
        panel=TRAIN,
        shown="20 for PVTv2 and networks without classes, else 0",
        ge=0,
    )
    map_weight: float | None = setting(
        None, "Weight of the last tokens, or of the map of the last stage.", shown="0", ge=0
    )
    teacher_views: int | None = setting(
        None,
        "Keep the teacher's logits on disk, for so many views of an image; 0: none.",
        "--teacher-views",
        panel=TRAIN,
        shown="0",
        ge=0,
    )
    ema_decay: float | None = setting(
        None, "Of the moving average of the weights, which is the result; 0: none.", shown="0.9999", ge=0, lt=1
    )
    clip_grad: float | None = setting(None, "Largest norm of all gradients together; 0: no limit.", shown="0", ge=0)
    amp: Amp | None = setting(
        None, "Precision of training.", "--amp", panel=TRAIN, shown="auto: bf16 or fp16 on GPUs, fp32 on the CPU"
    )
    compile: bool | None = setting(None, "Whether torch.compile makes the training faster.", shown="false")
    channels_last: bool | None = setting(None, "Memory layout of images and convolutions.", shown="false")
    workers: int | None = setting(
        None, "Reading processes.", "--workers", panel=TRAIN, shown="0; on GPUs cores - 1, at most 8", ge=0, le=1_024
    )
    checkpoint_minutes: float = setting(
        10.0, "Minutes between checkpoints within an epoch.", "--checkpoint-minutes", panel=TRAIN, ge=0
    )


class PrecisionRecipe(_Part):
    """What quantization is calibrated on, and what a precision may cost.

    `calib` is a data spec (None: the training images of `data`), `max_drop` the largest loss of top-1 against fp32 in
    points (of agreement with it where there are no labels).
    """

    max_drop: float = setting(0.5, "Points of accuracy that a precision may cost.", "--max-drop", panel=ENGINE, ge=0)
    calib: str | None = setting(
        None, "Images to calibrate on, like --data.", "--calib", panel=ENGINE, shown="those of --data"
    )
    calib_images: int = setting(256, "How many images to calibrate on.", "--calib-images", panel=ENGINE, ge=1)


class EngineRecipe(_Part):
    """What is built: every runtime in every precision that it has."""

    runtime: str = setting("auto", "Some of onnxruntime, tensorrt-rtx, ...", "--runtime", panel=ENGINE)
    precision: Precisions = setting("auto", "What is built; auto: what suits the runtime.", "--precision", panel=ENGINE)
    batch: Batch = setting("1:8:32", "Batch sizes min:opt:max.", "--batch", "--batch-profile", panel=ENGINE)
    targets: tuple[GpuTarget, ...] = setting(
        (), "GPU targets, e.g. sm86,sm120.", "--targets", panel=ENGINE, shown="the runtime's"
    )
    workspace_mib: int | None = setting(None, "Most scratch memory, MiB.", "--workspace", panel=ENGINE, ge=1)
    require_fused_attention: bool = setting(
        False, "Refuse engines with attention in pieces.", "--require-fused-attention", panel=ENGINE
    )


class ExportRecipe(_Part):
    """How the ONNX files are written, and on how many validation images graphs and engines are judged."""

    opset: int = setting(20, "ONNX operator set, 18 to 23.", "--opset", panel=ENGINE, ge=18, le=23)
    uint8_input: bool = setting(
        False, "Raw NHWC pixels as input, normalised in the graph.", "--uint8-input", panel=ENGINE
    )
    external_data: bool = setting(False, "ONNX weights in a file of their own.", "--save-external-data", panel=ENGINE)
    parity_images: int = setting(64, "Images that exported graphs and engines are compared on.", ge=1)
    accuracy_images: int = setting(1000, "Images that accuracy is measured on, at most.", ge=1)


class BenchRecipe(_Part):
    """How latency is measured; `seconds` is the time per batch size for each pair of dense and pruned engines."""

    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = setting(
        (1, 8), "Batch sizes to time.", "--bench-batches", panel=BENCH
    )
    seconds: float = setting(6.0, "Seconds per batch size and pair.", "--bench-seconds", panel=BENCH, gt=0)
    warmup: int = setting(5, "Calls of every engine before the first that is timed.", ge=1)
    rounds: int = setting(20, "Turns of the engines that are compared.", ge=2)
    streams: tuple[Annotated[int, Field(ge=1, le=MAX_STREAMS)], ...] = setting(
        (1,), "Sessions at once, e.g. 1,4.", "--streams", panel=BENCH
    )
    cuda_graph: bool = setting(False, "Replay recorded work on GPUs.", "--cuda-graph", panel=BENCH)


class Recipe(_Part):
    """One run of the main job."""

    model: str = setting(REQUIRED, "timm name, e.g. pvtv2_b0 or deit_tiny (see `models`).", "--model", "-m")
    weights: str | None = setting(
        None, "Checkpoint file, model folder, timm (hub), random, or demo.", "--weights", shown="demo on the demo data"
    )
    data: str = setting(
        "demo", "imagefolder:DIR, csv:FILE, hfds:NAME, wds:DIR or wds:URL, torch:NAME, or demo.", "--data"
    )
    class_map: str | None = setting(
        None,
        "Text with the name of one class a line, as the network numbers them, or JSON.",
        "--class-map",
        shown="none",
    )
    class_order: Order | None = setting(
        None,
        "How class folders are numbered: 2 before 10, or after.",
        "--class-order",
        shown="the more accurate",
    )
    image_key: str | None = setting(
        None, "Which picture of a sample in shards, e.g. jpg.", "--image-key", shown="the only one"
    )
    image_column: str | None = setting(
        None, "Column of a table, or of hfds:, that holds images.", "--image-column", shown="by name or type"
    )
    label_column: str | None = setting(
        None, "Column, or entry of JSON, that holds labels; none: no labels.", "--label-column", shown="by name or type"
    )
    recheck: bool = setting(False, "Look at every image again, also those that have not changed.", "--recheck")
    image_size: ImageSize | None = setting(
        None, "Side in pixels, or HxW.", "--image-size", shown="as the weights say", panel=INPUT
    )
    mean: tuple[float, ...] | None = setting(
        None, "One number per channel, for pixels in 0..1.", "--mean", shown="as the weights say", panel=INPUT
    )
    std: tuple[float, ...] | None = setting(
        None, "One number per channel, for pixels in 0..1.", "--std", shown="as the weights say", panel=INPUT
    )
    crop_pct: float | None = setting(
        None,
        "Share of the resized image that the central crop keeps.",
        "--crop-pct",
        shown="as the weights say",
        panel=INPUT,
        gt=0,
        le=4,
    )
    interpolation: Interpolation | None = setting(
        None, "How images are resized.", "--interpolation", shown="as the weights say", panel=INPUT
    )
    model_args: ModelArgs = setting(
        {}, "Argument of timm's architecture, key=value; several times.", "--model-arg", shown="none", panel=INPUT
    )
    allow_weak: bool = setting(False, "Go on with a dense network that is worse than it should be.", "--allow-weak")
    plan: PlanRecipe = PlanRecipe()
    score: ScoreRecipe = ScoreRecipe()
    compensate: CompensateRecipe = CompensateRecipe()
    distill: DistillRecipe = DistillRecipe()
    device: str = setting(
        "auto", "auto, cpu, cuda or cuda:N: the GPU that PyTorch and GPU engines use.", "--device", panel=TRAIN
    )
    engine: EngineRecipe = EngineRecipe()
    precision: PrecisionRecipe = PrecisionRecipe()
    export: ExportRecipe = ExportRecipe()
    bench: BenchRecipe = BenchRecipe()
    detect: DetectRecipe | None = setting(None, "Detectors too, on this COCO folder or demo.", "--detect", panel=RUN)
    seed: int = setting(0, "Of everything that is drawn.", "--seed", panel=RUN, ge=0, lt=2**63)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Validate plain values.

    Raises:
        UserError: a value is out of range, of the wrong type, or unknown.
    """
    return validated(Recipe, values, "upvits-deploy build")


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Values of a recipe in TOML: a file, or the run directory that holds one."""
    from upvits.deploy.store.run_dir import read_recipe, read_toml  # not for --help

    place = user_path(path)
    return read_recipe(place) if place.is_dir() else read_toml(place)
