"""Detectors in every precision and runtime of a run, and the AP of each on real images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from onnx import ModelProto

from upvits.calib_data.errors import BuildError, GateError
from upvits.deploy.detectors.accuracy import read_record
from upvits.deploy.detectors.documents import ApRecord, ApRecords
from upvits.deploy.detectors.graph import network_of, with_network
from upvits.deploy.detectors.predictions import (
    BATCH,
    Predictions,
    batched,
    in_session,
    predict,
    read_detections,
    stacked,
)
from upvits.deploy.detectors.suppression import limits_of
from upvits.deploy.detectors.train_stage import DETECT
from upvits.deploy.graphs.files import load_model, save_model
from upvits.deploy.machine.environment import builder_facts
from upvits.deploy.precision import QUANTIZED, Converted, calibrate, convert, for_cpu, layer_sqnr, put_back
from upvits.deploy.recipe.detect import DetectRecipe, size_of
from upvits.deploy.recipe.request import Job
from upvits.deploy.report.detection import ITSELF
from upvits.deploy.runtimes import (
    BatchProfile,
    BuildOptions,
    Runtime,
    Session,
    open_model,
    read_engine,
    runtime_named,
)
from upvits.deploy.stages.documents import ModelName
from upvits.deploy.stages.engines import runs_here, timing_cache
from upvits.deploy.stages.job import Pixels, stage
from upvits.deploy.stages.precision import graph_name
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import load_document, save_document
from upvits.detection.coco import CocoData
from upvits.detection.detector import DetectorInfo, read_info
from upvits.detection.pictures import fitted

_RECORDS = "ap.json"
_CALIBRATION_BATCH, _SENSITIVITY_IMAGES = 4, 16


@dataclass(frozen=True, slots=True)
class Work:
    """What the stages of engines share.

    Attributes:
        job: the run.
        detectors: artifacts of trained detectors, by backbone.
        data: what they are judged on.
        recipe: of the detectors, resolved.
        pytorch_ap: AP in [0, 1] of PyTorch on the images that engines are judged on, by backbone; filled when it is
            first needed.
    """

    job: Job
    detectors: Mapping[ModelName, Artifact]
    data: CocoData
    recipe: DetectRecipe
    pytorch_ap: dict[ModelName, float] = field(default_factory=dict)

    def info(self, name: ModelName) -> DetectorInfo:
        """A detector without its weights."""
        return read_info(self.detectors[name].folder / "detector")


def engines(work: Work) -> tuple[list[Artifact], list[str]]:
    """7-detect/RUNTIME-PRECISION: an engine of every detector, judged; and notes on what was left out.

    Raises:
        GateError: a precision that was asked for by name, or fp32, loses more AP than `--max-drop`.
        BuildError: a runtime that was asked for by name cannot build a detector.
    """
    job, limit = work.job, work.job.recipe.precision.max_drop
    asked = job.recipe.engine.precision
    built, notes = [], []
    for runtime, precision in job.engines:
        try:
            artifact = _engine(work, runtime, precision)
        except (BuildError, GateError) as error:  # the gate: parts of it run in a wider type than the graph says
            if job.recipe.engine.runtime != "auto" or precision in asked:
                raise
            notes.append(f"{runtime.name} {precision} detectors were left out: {error.what}. {error.why}")
            continue
        worst = max(record.drop for record in read_records(artifact).by_model.values())
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


def read_records(artifact: Artifact) -> ApRecords:
    """`ap.json` of graphs or engines."""
    return load_document(artifact.folder / _RECORDS, ApRecords)


def _engine(work: Work, runtime: Runtime, precision: str) -> Artifact:
    job, batches = work.job, work.recipe.batches
    graphs = None if precision == "fp32" else _graphs(work, runtime, precision)
    options = BuildOptions(
        precision=precision,
        batch=BatchProfile(1, min(batches), max(BATCH, *batches)),
        targets=job.recipe.engine.targets if runtime.has_targets else (),
        workspace_mib=job.recipe.engine.workspace_mib,
    )
    builder = builder_facts(runtime.libraries, on_cpu=runtime.on_cpu)

    def make(folder: Path) -> None:
        records = {}
        for name, detector in work.detectors.items():
            graph = detector.folder / "model.onnx" if graphs is None else graphs.folder / name / "model.onnx"
            runtime.build(graph, folder / name, replace(options, timing_cache=timing_cache(builder)))
            of_graph = None if graphs is None else read_records(graphs).by_model[name]
            records[name] = _record(work, name, folder / name, graph, of_graph)
        save_document(folder / _RECORDS, ApRecords(**records))

    inputs: dict[str, str] = {name: detector.digest for name, detector in work.detectors.items()}
    if graphs is not None:
        inputs["graphs"] = graphs.digest
    settings = {"runtime": runtime.name, "ap_images": work.recipe.ap_images, **asdict(options)}
    return stage(job, f"{DETECT}/{runtime.name}-{precision}", settings, {**inputs, **builder}, make)


def _record(work: Work, name: ModelName, engine: Path, graph: Path, of_graph: ApRecord | None) -> ApRecord:
    """AP of an engine where it runs here, otherwise of its graph on ONNX Runtime.

    Args:
        work: what the engine is judged on.
        name: of the backbone.
        engine: folder.
        graph: the ONNX file that it was built from.
        of_graph: AP of that file where it was measured already, in the search for its layers.
    """
    if runs_here(read_engine(engine)):
        with runtime_named(read_engine(engine).runtime).open(engine) as session:
            record = _ap(work, name, session).model_copy(update={"measured_on": ITSELF})
    elif of_graph is not None:
        record = of_graph
    else:
        with open_model(load_model(graph)) as session:
            record = _ap(work, name, session)
    kept = () if of_graph is None else of_graph.kept
    return record.model_copy(update={"kept": kept, "graphs_tried": None})


def _graphs(work: Work, runtime: Runtime, precision: str) -> Artifact:
    """7-detect/graph-PRECISION: the network in that precision, the decoding of boxes in fp32."""
    job, recipe = work.job, work.job.recipe.precision

    def make(folder: Path) -> None:
        records = {}
        for name, detector in work.detectors.items():
            decode = load_model(detector.folder / "model.onnx")
            converted, records[name] = _converted(work, name, decode, precision, runtime.base_precision)
            (folder / name).mkdir()
            save_model(with_network(decode, converted.model), folder / name / "model.onnx")
        save_document(folder / _RECORDS, ApRecords(**records))

    settings = {"precision": precision, "rest": runtime.base_precision, "max_drop": recipe.max_drop,
                "ap_images": work.recipe.ap_images, "calib_images": recipe.calib_images}  # fmt: skip
    inputs: dict[str, str] = {name: detector.digest for name, detector in work.detectors.items()}
    return stage(job, f"{DETECT}/graph-{graph_name(runtime, precision)}", settings, inputs, make)


def _converted(
    work: Work, name: ModelName, decode: ModelProto, precision: str, base_precision: str
) -> tuple[Converted, ApRecord]:
    """A detector's network in a precision, with as few layers put back as its AP allows."""
    limit, calib = work.job.recipe.precision.max_drop, work.job.recipe.precision.calib_images
    network, tried = network_of(decode), dict[tuple[str, ...], ApRecord]()

    def ap(candidate: Converted) -> ApRecord:
        if candidate.kept not in tried:
            with open_model(for_cpu(with_network(decode, candidate.model))) as session:
                tried[candidate.kept] = _ap(work, name, session)
        return tried[candidate.kept]

    def fed(images: int) -> Iterator[Pixels]:
        pictures = fitted(work.data.train, work.info(name).preprocess(size_of(work.recipe)), images)
        return (stacked(batch) for batch in batched(pictures, _CALIBRATION_BATCH))

    ranges = calibrate(network, fed(calib), quiet=work.job.quiet) if precision in QUANTIZED else None
    converted = convert(network, precision, ranges=ranges, base_precision=base_precision)
    if ap(converted).drop > limit:
        order = list(layer_sqnr(network, converted, fed(_SENSITIVITY_IMAGES), quiet=work.job.quiet))
        search = put_back(
            network, ranges, precision, base_precision, order, lambda candidate: ap(candidate).drop <= limit
        )
        converted = search.converted
    return converted, ap(converted).model_copy(update={"kept": converted.kept, "graphs_tried": len(tried)})


def _ap(work: Work, name: ModelName, session: Session) -> ApRecord:
    """AP of a detector in a session, and what it lost against PyTorch on the same images."""
    info = work.info(name)
    predictor = in_session(session, info.classes, info.preprocess(size_of(work.recipe)), limits_of(info.config))
    predictions = predict(predictor, work.data, work.recipe.ap_images, quiet=work.job.quiet)
    ap, reference = predictions.ap(work.data).ap, _pytorch_ap(work, name, predictions.image_ids)
    return ApRecord(ap=100 * ap, drop=100 * (reference - ap), images=len(predictions.image_ids))


def _pytorch_ap(work: Work, name: ModelName, image_ids: tuple[int, ...]) -> float:
    """AP in [0, 1] of PyTorch on the images that engines are judged on, which are the same for all."""
    if name not in work.pytorch_ap:
        detector = work.detectors[name]
        if len(image_ids) == work.data.val.count:
            work.pytorch_ap[name] = read_record(detector).pytorch.ap
        else:
            chosen = {*image_ids}
            boxes = [box for box in read_detections(detector.folder) if box["image_id"] in chosen]
            work.pytorch_ap[name] = Predictions(boxes, image_ids).ap(work.data).ap
    return work.pytorch_ap[name]
