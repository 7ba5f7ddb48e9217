"""The report of a run: `report.json` is authoritative, everything that people read is derived from it.

Units: latency in milliseconds, accuracy and agreement in percent, MACs per image, memory in MB (10**6 bytes), time in
seconds.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from upvits.calib_data.documents import Count, Facts, Name, Natural, Number, Positive, Scalar, Text, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.paths import relative_path
from upvits.deploy.measure.document import Best, Environment, Finding, Latencies, LayerTimes, Speedups, Throughput
from upvits.deploy.report.answers import Answers, Epoch
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

    params: Natural
    macs: Natural
    top1: Number | None
    latency_ms: Latencies = {}


class PairedImages(_Document):
    """Dense and pruned on the same labelled images: `lost` only the dense network has right, `won` only the pruned.

    `largest_class` is how many of the images are of the most frequent class.
    """

    images: Natural
    lost: Count
    won: Count
    largest_class: Count


class PrunedFigures(ModelFigures):
    """`top1_after_prune`: before fine-tuning. `agreement`: images with the dense model's top-1, in percent.

    `paired` is what `top1` and the dense network's are made of; None in older runs and without labels.
    `top1_after_deletion` is what the same plan leaves without compensation; None when that was switched off.
    """

    top1_after_prune: Number | None
    agreement: Number | None
    top1_after_deletion: Number | None = None
    paired: PairedImages | None = None


class Compensation(_Document):
    """What rotating and refitting was worth: KL to the dense network in nats, on `held_out` images of the `images`.

    `kl_deleted` is plain deletion of the same units, `kl_cut` after rotation and cut, `kl` what was kept. `layers` were
    looked at, `refitted` got new weights; the others were not better on the held-out images.
    """

    images: Count
    held_out: Count
    kl_deleted: float
    kl_cut: float
    kl: float
    accepted: bool
    layers: Count
    refitted: Count
    seconds: Number
    warnings: list[Text] = []


class Stability(_Document):
    """Agreement of a group's scores on two halves of the proxy set; `overlap` of the kept units, as a share."""

    group: Name
    spearman: Number
    overlap: Number


class Timing(_Document):
    """Dense and pruned network, timed in turns: ms per batch, and the ratio with its range over rounds."""

    dense_ms: Positive
    ms: Positive
    speedup: Positive
    low: Positive
    high: Positive


class Target(_Document):
    """A latency that was asked for, on the runtime where it was searched.

    `searched` is of the network of the plan when it was chosen, `measured` of the finished engine. Two measurements at
    different times differ by what else the machine did; each holds the dense network too.
    """

    asked: Name
    runtime: Name
    precision: Name
    batch: Natural
    searched: Timing
    measured: Timing | None = None
    met: bool


class Width(_Document):
    """One prunable dimension before and after."""

    group: Name
    before: Natural
    after: Count


class PlanFigures(_Document):
    """What was asked of the plan, what it came to, and the widths.

    `blocks`: for lists that got shorter, the dense blocks that attention and FFN of each block left come from.
    `unstable`: groups whose selection depends on the draw of the proxy images.
    """

    asked: dict[Name, Scalar]
    got: dict[Name, Scalar]
    widths: list[Width]
    planner: Name = "uniform"
    blocks: dict[Name, list[tuple[Count, Count]]] = {}
    unstable: list[Stability] = []


class Parity(_OpenDocument):
    """One gate: outputs of `candidate` against those of `reference` on real images."""

    model: Literal["dense", "pruned"]
    reference: Name
    candidate: Name
    images: Count
    max_abs: Number
    min_cosine: Number
    top1_agreement: Number
    passed: bool


class BuiltFigures(_Document):
    """What the runtime made of the graph; see `deploy.runtimes.interface.Built`."""

    source: Name
    layers: Count
    by_precision: dict[Name, Count]
    gemms: dict[Name, Count]
    planned: dict[Name, Count]
    attention_blocks: Count
    attention_fused: Count | None
    casts: Count
    reformats: Count
    memory_bytes: Count | None


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
    runtime: Name
    precision: Name
    images: Count
    top1: Number | None
    agreement: Number
    drop: Number
    sqnr_db: Number
    measured_on: Name
    lost: Count | None = None
    won: Count | None = None
    rest: Name | None = None
    in_fp32: list[Name] = []
    quantized: Count | None = None
    kept: list[Name] = []
    worst_layer: Name | None = None
    worst_layer_sqnr_db: float | None = None
    drop_without_search: Number | None = None
    graphs_tried: Count | None = None
    calibration_images: Count | None = None
    calibration_digest: Name | None = None
    calibration_method: Name | None = None


def _in_run(path: str) -> str:
    try:
        return relative_path(path)
    except ValueError as error:
        raise ValueError(f"{path!r} is outside of the run") from error


class EngineFigures(_OpenDocument):
    """One built engine; `path` is relative to the run directory."""

    model: Literal["dense", "pruned"]
    runtime: Name
    precision: Name
    target: Name
    path: Annotated[str, AfterValidator(_in_run)]
    bytes: Count
    seconds: Number
    built: BuiltFigures | None = None


class Report(_Document):
    """The whole result of a run. `ratio` is None where the widths came from a target or a smaller model."""

    format_version: Literal[2] = 2
    model: Name
    ratio: Number | None
    data: Name
    weights: Name
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
    gpu: Facts = {}
    stages: list[StageRecord] = []
    plan: PlanFigures | None = None
    compensation: Compensation | None = None
    target: Target | None = None
    detection: DetectionReport | None = None
    answers: Answers | None = None
    learning: list[Epoch] = []
    measurement: Facts = {}
    environment: Environment = Environment()
    reproduce: list[Text] = []
    notes: list[Text] = []

    @model_validator(mode="after")
    def _compares_what_was_measured(self) -> Report:
        for runtime, by_precision in self.speedup.items():
            for precision, by_batch in by_precision.items():
                for batch in by_batch:
                    for figures in (self.dense, self.pruned):
                        if batch not in figures.latency_ms.get(runtime, {}).get(precision, {}):
                            raise ValueError(f"speedup of {runtime} {precision} at batch {batch} without its latencies")
        return self


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
    if not path.is_file():
        raise UserError(
            f"{run_dir} has no {REPORT}.",
            why="The report is written at the end of a run.",
            fix="Run `upvits-deploy build` with this folder as --output: it continues where it stopped.",
        )
    return read_document(path, Report, fix="Run `upvits-deploy build` with this folder as --output to write it again.")
