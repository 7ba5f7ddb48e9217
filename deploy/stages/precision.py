"""The precision stage: each fp32 graph in every precision that an engine is asked for, and what that costs.

Costs are found on ONNX Runtime's CUDA provider where there is a GPU, else on its CPU provider, which both compute what
the graph says; the engines that run on this
machine are measured again by themselves, in the bench stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto
from safetensors.numpy import load_file

from upvits.calib_data import Images, batches, proxy_set
from upvits.calib_data.errors import GateError
from upvits.deploy.choices import MODELS
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.graphs.files import load_model, save_model
from upvits.deploy.measure.accuracy import Accuracy, accuracy
from upvits.deploy.precision import QUANTIZED, Converted, Ranges, calibrate, convert, for_cpu, layer_sqnr, put_back
from upvits.deploy.recipe.request import Job
from upvits.deploy.runtimes import Runtime, open_judged, where_judged
from upvits.deploy.stages.documents import Calibration, PrecisionRecord, Precisions
from upvits.deploy.stages.job import Pixels, model_input, stage, validation_outputs
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import load_document, save_document

_CALIBRATION_BATCH = 8
_SENSITIVITY_IMAGES = 32
_FEW_IMAGES = 32


def graph_name(runtime: Runtime, precision: str) -> str:
    """Name of the graph that a runtime builds for a precision: quantized ones differ in what runs around them."""
    return f"{precision}-{runtime.base_precision}" if precision in QUANTIZED else precision


def convert_graphs(job: Job, exported: Artifact) -> dict[str, Artifact]:
    """4-precision: the graphs that the engines need beside the fp32 ones, by name."""
    needed = {
        graph_name(runtime, precision): (precision, runtime.base_precision)
        for runtime, precision in job.engines
        if precision != "fp32"
    }
    known: dict[str, Ranges] = {}
    return {name: _graphs(job, exported, name, *how, known) for name, how in needed.items()}


def _graphs(
    job: Job, exported: Artifact, name: str, precision: str, base_precision: str, known: dict[str, Ranges]
) -> Artifact:
    """One precision; `known` are ranges by network, which do not depend on it."""
    recipe = job.recipe.precision

    def work(folder: Path) -> None:
        records = {}
        for model in MODELS:
            fp32 = load_model(exported.folder / model / "model.onnx")
            reference = load_file(exported.folder / "accuracy_reference.safetensors")
            if precision in QUANTIZED and model not in known:
                known[model] = _ranges(job, fp32)
            ranges = known[model] if precision in QUANTIZED else None
            graph, records[model] = _graph(
                job, fp32, precision, base_precision, ranges, reference[model], reference["labels"]
            )
            (folder / model).mkdir()
            save_model(graph, folder / model / "model.onnx", external_data=job.recipe.export.external_data)
        save_document(folder / "precision.json", Precisions(**records))

    settings = {"precision": precision, "rest": base_precision, "max_drop": recipe.max_drop}
    inputs = {"onnx": exported.digest}
    if precision in QUANTIZED:
        settings |= {"calib_images": recipe.calib_images, "seed": job.recipe.seed}
        inputs["calibration"] = job.calibration.digest
    if not where_judged().on_cpu:  # rounds otherwise
        inputs["judged"] = where_judged().name
    artifact = stage(job, f"4-precision/{name}", settings, inputs, work)
    _require_accuracy(artifact, precision, recipe.max_drop, asked=precision in job.recipe.engine.precision)
    return artifact


def _graph(
    job: Job,
    fp32: ModelProto,
    precision: str,
    base_precision: str,
    ranges: Ranges | None,
    reference: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
) -> tuple[ModelProto, PrecisionRecord]:
    """One network in one precision, and the record of how it got there."""
    known: dict[tuple[str, ...], Accuracy] = {}

    def cost(converted: Converted) -> Accuracy:
        if converted.kept not in known:
            known[converted.kept] = accuracy(reference, _outputs(job, converted.model), labels, precision)
        return known[converted.kept]

    converted = convert(fp32, precision, ranges=ranges, base_precision=base_precision)
    first = kept = cost(converted)
    judged = proxy_set(job.calibration, _SENSITIVITY_IMAGES, job.recipe.seed)
    errors = layer_sqnr(fp32, converted, _fed(job, judged), quiet=job.quiet)
    limit = job.recipe.precision.max_drop
    if first.loses_more_than(limit):
        search = put_back(
            fp32, ranges, precision, base_precision, list(errors), lambda graph: not cost(graph).loses_more_than(limit)
        )
        converted, kept = search.converted, cost(search.converted)
    worst = next((node for node in errors if node not in converted.kept), None)
    return converted.model, PrecisionRecord(
        precision=precision,
        base_precision=converted.base_precision,
        in_fp32=GraphFacts(converted.model).in_fp32(),
        accuracy=kept,
        drop_without_search=first.drop,
        graphs_tried=len(known),
        quantized=converted.quantized,
        kept=converted.kept,
        folded=converted.folded,
        worst_layer=worst,
        worst_layer_sqnr_db=None if worst is None else round(errors[worst], 2),
        layer_sqnr_db={node: round(decibels, 2) for node, decibels in errors.items()},
        calibration=ranges and Calibration(images=ranges.images, digest=ranges.digest, method=ranges.method),
    )


def _ranges(job: Job, fp32: ModelProto) -> Ranges:
    """Ranges of what the layers of one network read."""
    chosen = proxy_set(job.calibration, job.recipe.precision.calib_images, job.recipe.seed)
    return calibrate(fp32, _fed(job, chosen), quiet=job.quiet)


def _fed(job: Job, images: Images) -> Iterator[Pixels]:
    """Images as the exported model takes them, a batch at a time: memory does not grow with their number."""
    return (model_input(job, batch) for batch, _ in batches(images, job.preprocess, _CALIBRATION_BATCH))


def _outputs(job: Job, graph: ModelProto) -> np.ndarray[Any, Any]:
    with open_judged(for_cpu(graph)) as session:
        return validation_outputs(job, {"graph": session})[0]["graph"]


def holds(artifact: Artifact, max_drop: float) -> bool:
    """Whether both networks keep their accuracy in this precision."""
    return not any(record.accuracy.loses_more_than(max_drop) for record in read_precisions(artifact).by_model.values())


def read_precisions(artifact: Artifact) -> Precisions:
    """How the graphs of a precision were made."""
    return load_document(artifact.folder / "precision.json", Precisions)


def _require_accuracy(artifact: Artifact, precision: str, max_drop: float, *, asked: bool) -> None:
    """The gate `--max-drop`, for precisions that were asked for by name; others are left out instead.

    Raises:
        GateError: a network loses more; says how much.
    """
    for name, record in read_precisions(artifact).by_model.items():
        cost = record.accuracy
        if asked and cost.loses_more_than(max_drop):
            raise GateError(
                f"the {name} network loses {cost.drop:.2f} points in {precision}, {max_drop:g} are allowed",
                why=f"Measured on {cost.images} validation images against fp32, with a standard error of "
                f"{cost.drop_error:.2f} points.",
                fix="Allow more with --max-drop, calibrate on more or better images (--calib, --calib-images), or "
                "leave this precision out.",
            )


def left_out(job: Job, graphs: Mapping[str, Artifact]) -> list[str]:
    """A note for every precision that `auto` had to leave out."""
    limit = job.recipe.precision.max_drop
    notes = []
    for name, artifact in graphs.items():
        records = read_precisions(artifact).by_model
        lost = ", ".join(f"the {m} network loses {r.accuracy.drop:.2f} points" for m, r in records.items())
        if not holds(artifact, limit):
            notes.append(f"{name} engines were left out: {lost} (--max-drop {limit:g}).")
        seen = min((r.calibration.images for r in records.values() if r.calibration), default=_FEW_IMAGES)
        if seen < _FEW_IMAGES:
            notes.append(f"{name} was calibrated on {seen} images only; from {_FEW_IMAGES} on ranges become reliable.")
    return notes
