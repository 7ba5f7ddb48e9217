"""The report of a run: `report.json` is authoritative, everything that people read is derived from it.

Units: latency in milliseconds, accuracy and agreement in percent, MACs per image, memory in MB (10**6 bytes), time in
seconds.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from upvits.calib_data.errors import UserError
from upvits.calib_data.paths import relative_path
from upvits.deploy.measure.document import Best, Finding, Latencies, LayerTimes, Speedups, Throughput
from upvits.deploy.report.detection import DetectionReport
from upvits.deploy.runtimes.interface import Engine
from upvits.deploy.store.artifacts import StageRecord

REPORT = "report.json"


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _OpenDocument(_Document):
    """Has the named fields at least; whoever measured may say more."""

    model_config = ConfigDict(extra="allow", frozen=True)


class ModelFigures(_Document):
    """What a model is and does. `top1` is None where the images have no labels."""

    params: int
    macs: int
    top1: float | None
    latency_ms: Latencies = {}


class PairedImages(_Document):
    """Dense and pruned on the same labelled images: `lost` only the dense network has right, `won` only the pruned.

    `largest_class` is how many of the images are of the most frequent class.
    """

    images: int = Field(ge=1)
    lost: int = Field(ge=0)
    won: int = Field(ge=0)
    largest_class: int = Field(ge=0)


class PrunedFigures(ModelFigures):
    """`top1_after_prune`: before fine-tuning. `agreement`: images with the dense model's top-1, in percent.

    `paired` is what `top1` and the dense network's are made of; None in older runs and without labels.
    `top1_after_deletion` is what the same plan leaves without compensation; None when that was switched off.
    """

    top1_after_prune: float | None
    agreement: float | None
    top1_after_deletion: float | None = None
    paired: PairedImages | None = None


class Compensation(_Document):
    """What rotating and refitting was worth: KL to the dense network in nats, on `held_out` images of the `images`.

    `kl_deleted` is plain deletion of the same units, `kl_cut` after rotation and cut, `kl` what was kept. `layers` were
    looked at, `refitted` got new weights; the others were not better on the held-out images.
    """

    images: int
    held_out: int
    kl_deleted: float
    kl_cut: float
    kl: float
    accepted: bool
    layers: int
    refitted: int
    seconds: float
    warnings: list[str] = []


class Stability(_Document):
    """Agreement of a group's scores on two halves of the proxy set; `overlap` of the kept units, as a share."""

    group: str
    spearman: float
    overlap: float


class Timing(_Document):
    """Dense and pruned network, timed in turns: ms per batch, and the ratio with its range over rounds."""

    dense_ms: float
    ms: float
    speedup: float
    low: float
    high: float


class Target(_Document):
    """A latency that was asked for, on the runtime where it was searched.

    `searched` is of the network of the plan when it was chosen, `measured` of the finished engine. Two measurements at
    different times differ by what else the machine did; each holds the dense network too.
    """

    asked: str
    runtime: str
    precision: str
    batch: int
    searched: Timing
    measured: Timing | None = None
    met: bool


class Width(_Document):
    """One prunable dimension before and after."""

    group: str
    before: int
    after: int


class PlanFigures(_Document):
    """What was asked of the plan, what it came to, and the widths.

    `blocks`: for lists that got shorter, the dense blocks that attention and FFN of each block left come from.
    `unstable`: groups whose selection depends on the draw of the proxy images.
    """

    asked: dict[str, Any]
    got: dict[str, Any]
    widths: list[Width]
    planner: str = "uniform"
    blocks: dict[str, list[tuple[int, int]]] = {}
    unstable: list[Stability] = []


class Parity(_OpenDocument):
    """One gate: outputs of `candidate` against those of `reference` on real images."""

    model: Literal["dense", "pruned"]
    reference: str
    candidate: str
    images: int
    max_abs: float
    min_cosine: float
    top1_agreement: float
    passed: bool


class BuiltFigures(_Document):
    """What the runtime made of the graph; see `deploy.runtimes.interface.Built`."""

    source: str
    layers: int
    by_precision: dict[str, int]
    gemms: dict[str, int]
    planned: dict[str, int]
    attention_blocks: int
    attention_fused: int | None
    casts: int
    reformats: int
    memory_bytes: int | None


class AccuracyFigures(_Document):
    """A model in one precision, on real images. Percent, and dB of the logits against the fp32 graph of the same model.

    `measured_on` says what ran: the engine itself, or its graph on ONNX Runtime's CPU provider. `drop` is the loss of
    top-1 against the fp32 graph (which was compared with PyTorch), in points; of agreement, without labels.
    Of the images, `lost` were right in the fp32 graph alone and `won` in this precision alone.
    `drop_without_search` is what it was before layers were put back, `graphs_tried` how many graphs the search judged,
    on the same images.
    `worst_layer` is the quantized layer with the largest error, `worst_layer_sqnr_db` that error.
    `in_fp32` names the kinds of nodes that stay fp32 in a graph of half precision.
    `quantized` layers run in int8 or fp8; `kept` ones were put back to `rest` by the search for `--max-drop`.
    """

    model: Literal["dense", "pruned"]
    runtime: str
    precision: str
    images: int
    top1: float | None
    agreement: float
    drop: float
    sqnr_db: float
    measured_on: str
    lost: int | None = None
    won: int | None = None
    rest: str | None = None
    in_fp32: list[str] = []
    quantized: int | None = None
    kept: list[str] = []
    worst_layer: str | None = None
    worst_layer_sqnr_db: float | None = None
    drop_without_search: float | None = None
    graphs_tried: int | None = None
    calibration_images: int | None = None
    calibration_digest: str | None = None
    calibration_method: str | None = None


def _in_run(path: str) -> str:
    try:
        return relative_path(path)
    except ValueError as error:
        raise ValueError(f"{path!r} is outside of the run") from error


class EngineFigures(_OpenDocument):
    """One built engine; `path` is relative to the run directory."""

    model: Literal["dense", "pruned"]
    runtime: str
    precision: str
    target: str
    path: Annotated[str, AfterValidator(_in_run)]
    bytes: int
    seconds: float
    built: BuiltFigures | None = None


class Report(_Document):
    """The whole result of a run. `ratio` is None where the widths came from a target or a smaller model."""

    format_version: Literal[2] = 2
    model: str
    ratio: float | None
    data: str
    weights: str
    dense: ModelFigures
    pruned: PrunedFigures
    speedup: Speedups = {}
    speedup_low: Speedups = {}
    speedup_high: Speedups = {}
    parity: list[Parity] = []
    engines: list[EngineFigures] = []
    accuracy: list[AccuracyFigures] = []
    throughput: list[Throughput] = []
    best: list[Best] = []
    layer_times: list[LayerTimes] = []
    findings: list[Finding] = []
    gpu: dict[str, Any] = {}
    stages: list[StageRecord] = []
    plan: PlanFigures | None = None
    compensation: Compensation | None = None
    target: Target | None = None
    detection: DetectionReport | None = None
    measurement: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    reproduce: list[str] = []
    notes: list[str] = []


def engine_figures(model: Literal["dense", "pruned"], engine: Engine, run_dir: Path) -> EngineFigures:
    """Describe a built engine for the report."""
    return EngineFigures(
        model=model,
        runtime=engine.runtime,
        precision=engine.precision,
        target=", ".join(engine.targets) or "any",
        path=engine.path.relative_to(run_dir).as_posix(),
        bytes=engine.bytes,
        seconds=engine.seconds,
        built=None if engine.built is None else BuiltFigures(**asdict(engine.built)),
    )


def load_report(run_dir: Path) -> Report:
    """Read report.json of a run.

    Raises:
        UserError: the file is missing, or is not a report of this version.
    """
    path = run_dir / REPORT
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise FileNotFoundError(path)
        return Report.model_validate_json(path.read_bytes())
    except OSError:
        raise UserError(
            f"{run_dir} has no {REPORT}.",
            why="The report is written at the end of a run.",
            fix="Run `upvits-deploy build` with this folder as --output: it continues where it stopped.",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"cannot read {path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}.",
            why="It is damaged or was written by another version.",
            fix="Run `upvits-deploy build` with this folder as --output to write it again.",
        ) from error
