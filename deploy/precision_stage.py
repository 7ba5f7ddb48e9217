"""The precision stage: each fp32 graph in every precision that an engine is asked for, and what that costs.

Costs are found on ONNX Runtime's CPU provider, which computes what the graph says; the engines that run on this
machine are measured again by themselves, in the bench stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from safetensors.numpy import load_file

from calib_data import batches, proxy_images
from calib_data.errors import GateError
from deploy.artifacts import Artifact
from deploy.graphs.facts import GraphFacts
from deploy.graphs.files import load_model, save_model
from deploy.job import EVAL_BATCH, MODELS, Job, model_input, read_json, stage, validation_images, write_json
from deploy.measure.accuracy import Accuracy, accuracy, outputs_of
from deploy.precision import QUANTIZED, Converted, calibrate, convert, for_cpu, layer_sqnr, put_back
from deploy.recipe import split_names
from deploy.runtimes import Runtime, open_model

_SENSITIVITY_BATCHES = 4


def precisions_for(runtime: Runtime, spec: str) -> tuple[str, ...]:
    """Precisions to build: those asked for; by default fp32, bf16 and int8 on CPUs, fp16 and int8 elsewhere."""
    usual = ("fp32", "bf16", "int8") if runtime.rest == "fp32" else ("fp16", "int8")
    wanted = dict.fromkeys(p for name in split_names(spec) for p in (usual if name == "auto" else (name,)))
    return tuple(name for name in wanted if name in runtime.precisions)


def graph_name(runtime: Runtime, precision: str) -> str:
    """Name of the graph that a runtime builds for a precision: quantized ones differ in what runs around them."""
    return f"{precision}-{runtime.rest}" if precision in QUANTIZED else precision


def precisions(job: Job, exported: Artifact) -> dict[str, Artifact]:
    """4-precision: the graphs that the engines need beside the fp32 ones, by name."""
    spec = job.recipe.engine.precision
    wanted = {
        graph_name(runtime, precision): (precision, runtime.rest)
        for runtime in job.runtimes.runtimes
        for precision in precisions_for(runtime, spec)
        if precision != "fp32"
    }
    return {name: _graphs(job, exported, name, *how) for name, how in wanted.items()}


def _graphs(job: Job, exported: Artifact, name: str, precision: str, rest: str) -> Artifact:
    recipe = job.recipe.precision

    def work(folder: Path) -> None:
        records = {}
        for model in MODELS:
            fp32 = load_model(exported.folder / model / "model.onnx")
            reference = load_file(exported.folder / "accuracy_reference.safetensors")
            graph, records[model] = _graph(job, fp32, precision, rest, reference[model], reference["labels"])
            (folder / model).mkdir()
            save_model(graph, folder / model / "model.onnx", external_data=job.recipe.export.external_data)
        write_json(folder / "precision.json", records)

    settings = {"precision": precision, "rest": rest, "max_drop": recipe.max_drop}
    inputs = {"onnx": exported.digest}
    if precision in QUANTIZED:
        settings |= {"calib_images": recipe.calib_images, "seed": job.recipe.seed}
        inputs["calibration"] = job.calibration.digest
    artifact = stage(job, f"4-precision/{name}", settings, inputs, work)
    _require_accuracy(artifact, precision, recipe.max_drop, asked=precision in split_names(job.recipe.engine.precision))
    return artifact


def _graph(
    job: Job, fp32: ModelProto, precision: str, rest: str, reference: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> tuple[ModelProto, dict[str, Any]]:
    """One network in one precision, and the record of how it got there."""

    def cost(converted: Converted) -> Accuracy:
        return accuracy(reference, _cpu_outputs(job, converted.model), labels, precision)

    if precision not in QUANTIZED:
        converted = convert(fp32, precision)
        record = {"precision": precision, "rest": precision, "in_fp32": GraphFacts(converted.model).in_fp32()}
        return converted.model, {**record, "accuracy": asdict(cost(converted))}
    images = proxy_images(job.calibration, job.preprocess, job.recipe.precision.calib_images, job.recipe.seed)
    fed = [model_input(job, batch) for batch in torch.split(images, 8)]
    ranges = calibrate(fp32, fed, quiet=job.quiet, total=len(fed))
    converted = convert(fp32, precision, ranges=ranges, rest=rest)
    first = found = cost(converted)
    errors = layer_sqnr(fp32, converted, fed[:_SENSITIVITY_BATCHES], quiet=job.quiet, total=_SENSITIVITY_BATCHES)
    tried = 1
    if found.drop > (limit := job.recipe.precision.max_drop):
        search = put_back(fp32, ranges, precision, rest, list(errors), lambda one: cost(one).drop <= limit)
        converted, found, tried = search.converted, cost(search.converted), search.tried
    worst = next((node for node in errors if node in converted.quantized), None)
    return converted.model, {
        "precision": precision,
        "rest": rest,
        "in_fp32": GraphFacts(converted.model).in_fp32(),
        "accuracy": asdict(found),
        "accuracy_without_search": asdict(first),
        "graphs_tried": tried,
        "quantized": list(converted.quantized),
        "kept": list(converted.kept),
        "folded": list(converted.folded),
        "worst_layer": worst,
        "worst_layer_sqnr_db": None if worst is None else round(errors[worst], 2),
        "calibration": {"images": ranges.images, "digest": ranges.digest, "method": ranges.method},
    }


def _cpu_outputs(job: Job, graph: ModelProto) -> np.ndarray[Any, Any]:
    chosen = validation_images(job.source, job.recipe.export.accuracy_images)
    fed = ((model_input(job, images), labels.numpy()) for images, labels in batches(chosen, job.preprocess, EVAL_BATCH))
    with open_model(for_cpu(graph)) as session:
        total = -(-len(chosen) // EVAL_BATCH)
        outputs, _ = outputs_of({"graph": session}, fed, EVAL_BATCH, total=total, quiet=job.quiet)
    return outputs["graph"]


def holds(artifact: Artifact, max_drop: float) -> bool:
    """Whether both networks keep their accuracy in this precision."""
    return all(
        record["accuracy"]["drop"] <= max_drop for record in read_json(artifact.folder / "precision.json").values()
    )


def _require_accuracy(artifact: Artifact, precision: str, max_drop: float, *, asked: bool) -> None:
    """The gate `--max-drop`, for precisions that were asked for by name; others are left out instead.

    Raises:
        GateError: a network loses more; says how much.
    """
    for name, record in read_json(artifact.folder / "precision.json").items():
        drop = record["accuracy"]["drop"]
        if asked and drop > max_drop:
            raise GateError(
                f"the {name} network loses {drop:.2f} points in {precision}, {max_drop:g} are allowed",
                why=f"Measured on {record['accuracy']['images']} validation images against fp32.",
                fix="Allow more with --max-drop, calibrate on more or better images (--calib, --calib-images), or "
                "leave this precision out.",
            )


def left_out(job: Job, graphs: Mapping[str, Artifact]) -> Sequence[str]:
    """A note for every precision that `auto` had to leave out."""
    return [
        f"{name} engines were left out: "
        + ", ".join(
            f"the {model} network loses {record['accuracy']['drop']:.2f} points"
            for model, record in read_json(artifact.folder / "precision.json").items()
        )
        + f" (--max-drop {job.recipe.precision.max_drop:g})."
        for name, artifact in graphs.items()
        if not holds(artifact, job.recipe.precision.max_drop)
    ]
