"""7-detect/compare: dense and pruned detectors side by side: AP, size, latency in turns, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from upvits.deploy.choices import MODELS
from upvits.deploy.detectors.accuracy import read_record
from upvits.deploy.detectors.draw import pictures
from upvits.deploy.detectors.engines import Work, read_records
from upvits.deploy.detectors.predictions import read_detections
from upvits.deploy.detectors.train_stage import DETECT
from upvits.deploy.machine.environment import environment
from upvits.deploy.measure.bench import BenchSettings, LatencyReport, interleave
from upvits.deploy.measure.document import Environment
from upvits.deploy.recipe.detect import size_of
from upvits.deploy.recipe.request import Job
from upvits.deploy.report.detection import (
    ApFigures,
    DetectionReport,
    DetectorEngine,
    DetectorFigures,
    DetectorLatency,
)
from upvits.deploy.runtimes import Engine, read_engine, runtime_named
from upvits.deploy.stages.documents import ModelName
from upvits.deploy.stages.engines import engine_of, runs_here
from upvits.deploy.stages.job import Pixels, stage
from upvits.deploy.store.artifacts import Artifact, open_artifact
from upvits.deploy.store.documents import load_document, save_document
from upvits.detection.average_precision import AveragePrecision
from upvits.detection.pictures import fitted

DOCUMENT = "detection.json"
_SCHEDULE = ("epochs", "batch_size", "lr", "weight_decay", "scale", "warmup", "amp", "fpn_channels", "stacked_convs",
             "imitation")  # fmt: skip


def compare(work: Work, engines: Sequence[Artifact], notes: Sequence[str]) -> Artifact:
    """Measure all engines that run here in turns, and put everything together.

    Args:
        work: detectors, and what they were judged on.
        engines: of `deploy.detectors.engines`.
        notes: on what was left out.
    """
    bench, recipe = work.job.recipe.bench, work.recipe

    def make(folder: Path) -> None:
        measured = _measured(work, engines)
        document = DetectionReport(
            coco=recipe.coco,
            detector=recipe.detector,
            classes=list(work.data.classes),
            train_images=work.data.train.count,
            val_images=work.data.val.count,
            size=size_of(recipe),
            schedule=recipe.model_dump(mode="json", include=set(_SCHEDULE)),
            detectors=[_figures(name, detector) for name, detector in work.detectors.items()],
            engines=[engine for artifact in engines for engine in _engines(work, artifact)],
            latency=_latencies(work, engines, measured),
            pictures=pictures(work.data, {name: read_detections(d.folder) for name, d in work.detectors.items()}),
            environment=Environment.model_validate(environment().as_json()),
            notes=[*work.data.notes, *notes],
        )
        save_document(folder / DOCUMENT, document)

    here = environment()
    inputs: dict[str, str] = {name: detector.digest for name, detector in work.detectors.items()}
    inputs |= {artifact.manifest.stage: artifact.digest for artifact in engines}
    inputs |= {"cpu": here.cpu, "cores": str(here.cores_usable), "gpus": ", ".join(gpu.name for gpu in here.gpus)}
    settings = {"batches": list(recipe.batches), "seconds": bench.seconds, "rounds": bench.rounds,
                "notes": list(notes)}  # fmt: skip
    return stage(work.job, f"{DETECT}/compare", settings, inputs, make)


def read_comparison(artifact: Artifact) -> DetectionReport:
    """The document of a `compare` artifact."""
    return load_document(artifact.folder / DOCUMENT, DetectionReport)


def detection_report(job: Job, tuned: Artifact, compared: Artifact | None) -> DetectionReport | None:
    """What is known of detectors on a run's networks.

    Args:
        job: of the run.
        tuned: the artifact of the fine-tuned network.
        compared: of this run; None takes an earlier `detect compare` of the same networks.
    """
    compared = compared or open_artifact(job.folder / DETECT / "compare")
    pruned = open_artifact(job.folder / DETECT / "pruned")
    if compared is None or pruned is None:
        return None
    same = pruned.manifest.inputs["backbone"] == tuned.digest
    return read_comparison(compared) if same and compared.manifest.inputs.get("pruned") == pruned.digest else None


def _figures(name: ModelName, detector: Artifact) -> DetectorFigures:
    record = read_record(detector)
    return DetectorFigures(
        model=name,
        params=record.params,
        backbone_params=record.backbone_params,
        macs=record.macs,
        macs_800x1344=record.macs_800x1344,
        pytorch=_in_percent(record.pytorch),
        turned_ap=None if record.turned is None else 100 * record.turned.ap,
        masks=None if record.masks is None else _in_percent(record.masks),
        agreement=record.agreement,
    )


def _in_percent(precision: AveragePrecision) -> ApFigures:
    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return ApFigures(
        ap=100 * precision.ap,
        ap50=100 * precision.ap50,
        ap75=100 * precision.ap75,
        ap_small=percent(precision.ap_small),
        ap_medium=percent(precision.ap_medium),
        ap_large=percent(precision.ap_large),
        per_class={name: percent(value) for name, value in precision.per_class.items()},
        images=precision.images,
    )


def _engines(work: Work, artifact: Artifact) -> list[DetectorEngine]:
    figures = []
    for name, record in read_records(artifact).by_model.items():
        engine = engine_of(artifact, name)
        figures.append(
            DetectorEngine(
                model=name,
                runtime=engine.runtime,
                precision=engine.precision,
                path=engine.path.relative_to(work.job.folder).as_posix(),
                bytes=engine.bytes,
                ap=record.ap,
                drop=record.drop,
                images=record.images,
                measured_on=record.measured_on,
                kept=list(record.kept),
            )
        )
    return figures


def _measured(work: Work, engines: Sequence[Artifact]) -> LatencyReport | None:
    """All engines that run here, in turns, on real images; named RUNTIME-PRECISION/MODEL as their folders are."""
    folders = {f"{a.folder.name}/{name}": a.folder / name for a in engines for name in work.detectors}
    folders = {name: folder for name, folder in folders.items() if runs_here(read_engine(folder))}
    if not folders:
        return None
    bench = work.job.recipe.bench
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(runtime_named(read_engine(folder).runtime).open(folder))
            for name, folder in folders.items()
        }
        feeds = _feeds(work, next(iter(sessions.values())).input_names[0])
        pairs = max(1, len(sessions) // len(work.detectors))
        settings = BenchSettings(seconds=bench.seconds * pairs, warmup=bench.warmup, rounds=bench.rounds)
        return interleave(sessions, dict.fromkeys(sessions, feeds), settings, quiet=work.job.quiet)


def _feeds(work: Work, name: str) -> dict[int, dict[str, Pixels]]:
    """Real images for every batch size that is timed."""
    preprocess, batches = work.info(next(iter(work.detectors))).preprocess(size_of(work.recipe)), work.recipe.batches
    images = [image.pixels.numpy() for image in fitted(work.data.val, preprocess, max(batches))]
    return {size: {name: np.stack([images[i % len(images)] for i in range(size)])} for size in batches}


def _latencies(work: Work, engines: Sequence[Artifact], measured: LatencyReport | None) -> list[DetectorLatency]:
    if measured is None:
        return []
    first = next(iter(work.detectors))
    return [
        _latency(engine_of(artifact, first), artifact.folder.name, batch, measured)
        for artifact in engines
        if f"{artifact.folder.name}/{first}" in measured.stats
        for batch in work.recipe.batches
    ]


def _latency(engine: Engine, name: str, batch: int, measured: LatencyReport) -> DetectorLatency:
    medians = {
        model: measured.stats[f"{name}/{model}"][batch].median
        for model in MODELS
        if f"{name}/{model}" in measured.stats
    }
    both = len(medians) == 2
    speedup = measured.ratio(f"{name}/dense", f"{name}/pruned", batch) if both else None
    return DetectorLatency(
        runtime=engine.runtime,
        precision=engine.precision,
        batch=batch,
        dense_ms=medians.get("dense"),
        pruned_ms=medians.get("pruned"),
        speedup=speedup.median if speedup else None,
        low=speedup.low if speedup else None,
        high=speedup.high if speedup else None,
    )
