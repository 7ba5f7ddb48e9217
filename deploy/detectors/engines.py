"""Detectors in every precision and runtime of a run, and the AP of each on real images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from upvits.calib_data.errors import BuildError, GateError
from upvits.deploy.detectors import judge
from upvits.deploy.detectors.graph import network_of, with_network
from upvits.deploy.detectors.suppression import limits_of
from upvits.deploy.detectors.train_stage import DETECT, figures_of, images_of
from upvits.deploy.graphs.files import load_model, save_model
from upvits.deploy.machine.environment import builder_facts
from upvits.deploy.precision import QUANTIZED, Converted, calibrate, convert, for_cpu, layer_sqnr, put_back
from upvits.deploy.recipe.detect import DetectRecipe
from upvits.deploy.report.detection import ITS_GRAPH, ITSELF
from upvits.deploy.runtimes import BatchProfile, BuildOptions, Runtime, Session, open_model, read_engine
from upvits.deploy.stages.engines import runs_here, timing_cache
from upvits.deploy.stages.job import Job, Pixels, read_json, stage, write_json
from upvits.deploy.stages.precision import graph_name, precisions_for
from upvits.deploy.store.artifacts import Artifact
from upvits.detection.average_precision import average_precision
from upvits.detection.coco import CocoData, Split
from upvits.detection.detector import read_info

_CALIBRATION_BATCH, _SENSITIVITY_IMAGES = 4, 16


@dataclass(frozen=True, slots=True)
class Work:
    """What the stages of detectors share: the run, trained detectors by backbone, and what they are judged on."""

    job: Job
    detectors: Mapping[str, Artifact]
    data: CocoData
    wanted: DetectRecipe


def engines(work: Work) -> tuple[list[Artifact], list[str]]:
    """7-detect/RUNTIME-PRECISION: an engine of every detector, judged; and notes on what was left out.

    Raises:
        GateError: a precision that was asked for by name, or fp32, loses more AP than `--max-drop`.
        BuildError: a runtime that was asked for by name cannot build a detector.
    """
    job, limit = work.job, work.job.recipe.precision.max_drop
    asked = job.recipe.engine.precision
    built, notes = [], []
    for runtime in job.runtimes.runtimes:
        for precision in precisions_for(runtime, job.recipe.engine.precision):
            try:
                artifact = _engine(work, runtime, precision)
            except (BuildError, GateError) as error:  # the gate: parts of it run in a wider type than the graph says
                if job.recipe.engine.runtime != "auto" or precision in asked:
                    raise
                notes.append(f"{runtime.name} {precision} detectors were left out: {error.what}. {error.why}")
                continue
            worst = max(record["drop"] for record in read_json(artifact.folder / "ap.json").values())
            if worst <= limit:
                built.append(artifact)
                continue
            lost = f"{runtime.name} {precision} detectors lose up to {worst:.2f} points of AP, {limit:g} are allowed"
            if precision == "fp32" or precision in asked:
                raise GateError(
                    lost,
                    why="Measured on the same validation images as PyTorch.",
                    fix="Allow more with --max-drop, or leave this precision out.",
                )
            notes.append(f"{lost}; they were left out.")
    return built, notes


def _engine(work: Work, runtime: Runtime, precision: str) -> Artifact:
    job = work.job
    graphs = None if precision == "fp32" else _graphs(work, runtime, precision)
    options = BuildOptions(
        precision=precision,
        batch=BatchProfile(1, min(work.wanted.batches), max(judge.BATCH, *work.wanted.batches)),
        targets=job.recipe.engine.targets if runtime.has_targets else (),
        workspace_mib=job.recipe.engine.workspace_mib,
    )
    builder = builder_facts(runtime.libraries, on_cpu=runtime.on_cpu)

    def make(folder: Path) -> None:
        figures = {}
        for name, detector in work.detectors.items():
            graph = detector.folder / "model.onnx" if graphs is None else graphs.folder / name / "model.onnx"
            runtime.build(graph, folder / name, replace(options, timing_cache=timing_cache(builder)))
            if runs_here(read_engine(folder / name)):
                with runtime.open(folder / name) as session:
                    figures[name] = {**_cost(work, detector, session), "measured_on": ITSELF}
            elif graphs is None:
                with open_model(load_model(graph)) as session:
                    figures[name] = {**_cost(work, detector, session), "measured_on": ITS_GRAPH}
            else:
                known = read_json(graphs.folder / "ap.json")[name]
                figures[name] = {**{key: known[key] for key in ("ap", "drop", "images")}, "measured_on": ITS_GRAPH}
            figures[name]["kept"] = [] if graphs is None else read_json(graphs.folder / "ap.json")[name]["kept"]
        write_json(folder / "ap.json", figures)

    inputs = {name: detector.digest for name, detector in work.detectors.items()}
    if graphs is not None:
        inputs["graphs"] = graphs.digest
    settings = {"runtime": runtime.name, "ap_images": work.wanted.ap_images, **asdict(options)}
    return stage(job, f"{DETECT}/{runtime.name}-{precision}", settings, {**inputs, **builder}, make)


def _graphs(work: Work, runtime: Runtime, precision: str) -> Artifact:
    """7-detect/graph-PRECISION: the network in that precision, the decoding of boxes in fp32."""
    job = work.job

    def make(folder: Path) -> None:
        figures = {}
        for name, detector in work.detectors.items():
            decode = load_model(detector.folder / "model.onnx")
            converted, figures[name] = _converted(work, detector, decode, precision, runtime.base_precision)
            (folder / name).mkdir()
            save_model(with_network(decode, converted.model), folder / name / "model.onnx")
        write_json(folder / "ap.json", figures)

    recipe = job.recipe.precision
    settings = {"precision": precision, "rest": runtime.base_precision, "max_drop": recipe.max_drop,
                "ap_images": work.wanted.ap_images, "calib_images": recipe.calib_images}  # fmt: skip
    inputs = {name: detector.digest for name, detector in work.detectors.items()}
    return stage(job, f"{DETECT}/graph-{graph_name(runtime, precision)}", settings, inputs, make)


def _converted(
    work: Work, detector: Artifact, decode: ModelProto, precision: str, base_precision: str
) -> tuple[Converted, dict[str, Any]]:
    """A detector's network in a precision, with as few layers put back as its AP allows."""
    limit, calib = work.job.recipe.precision.max_drop, work.job.recipe.precision.calib_images
    network, known = network_of(decode), dict[tuple[str, ...], dict[str, Any]]()

    def cost(one: Converted) -> dict[str, Any]:
        if one.kept not in known:
            with open_model(for_cpu(with_network(decode, one.model))) as session:
                known[one.kept] = _cost(work, detector, session)
        return known[one.kept]

    def fed(images: int) -> Iterator[Pixels]:
        pictures = images_of(work.data.train, read_info(detector.folder / "detector"), work.wanted, images)
        return (
            np.stack([one.pixels.numpy() for one in batch]) for batch in judge.batched(pictures, _CALIBRATION_BATCH)
        )

    ranges = calibrate(network, fed(calib), quiet=work.job.quiet) if precision in QUANTIZED else None
    converted = convert(network, precision, ranges=ranges, base_precision=base_precision)
    if cost(converted)["drop"] > limit:
        order = list(layer_sqnr(network, converted, fed(_SENSITIVITY_IMAGES), quiet=work.job.quiet))
        search = put_back(
            network, ranges, precision, base_precision, order, lambda one: bool(cost(one)["drop"] <= limit)
        )
        converted = search.converted
    return converted, {**cost(converted), "kept": list(converted.kept), "graphs_tried": len(known)}


def _cost(work: Work, detector: Artifact, session: Session) -> dict[str, Any]:
    """AP in percent, and what it lost against PyTorch on the same images."""
    split, info = work.data.val, read_info(detector.folder / "detector")
    images = images_of(split, info, work.wanted, work.wanted.ap_images)
    seen: list[int] = []
    found = judge.detections(
        judge.by_session(session),
        judge.noting(judge.watched_images(images, min(work.wanted.ap_images, split.count), work.job.quiet), seen),
        info.category_ids,
        limits_of(info.config),
    )
    own = average_precision(split.annotations, found, seen).ap
    return {"ap": 100 * own, "drop": 100 * (_reference(detector, split, seen) - own), "images": len(seen)}


def _reference(detector: Artifact, split: Split, image_ids: Sequence[int]) -> float:
    """AP of PyTorch's boxes on some of the images."""
    if len(image_ids) == split.count:
        return float(figures_of(detector)["pytorch"]["ap"])
    chosen = set(image_ids)
    found = [box for box in judge.read_predictions(detector.folder) if box["image_id"] in chosen]
    return average_precision(split.annotations, found, image_ids).ap
