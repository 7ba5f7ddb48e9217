"""7-detect/compare: dense and pruned detectors side by side: AP, size, latency in turns, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np

from upvits.deploy.detectors import judge
from upvits.deploy.detectors.draw import pictures
from upvits.deploy.detectors.engines import Work
from upvits.deploy.detectors.train_stage import DETECT, figures_of, images_of
from upvits.deploy.machine.environment import environment
from upvits.deploy.measure.bench import BenchSettings, LatencyReport, interleave
from upvits.deploy.recipe.detect import size_of
from upvits.deploy.report.detection import (
    ApFigures,
    BoxAgreement,
    DetectionReport,
    DetectorEngine,
    DetectorFigures,
    DetectorLatency,
    Name,
)
from upvits.deploy.runtimes import Engine, read_engine, runtime_named
from upvits.deploy.stages.engines import engine_of, runs_here
from upvits.deploy.stages.job import Pixels, read_json, stage
from upvits.deploy.store.artifacts import Artifact, atomic_write
from upvits.detection.detector import read_info

DOCUMENT = "detection.json"
_SCHEDULE = ("epochs", "batch_size", "lr", "weight_decay", "scale", "warmup", "amp", "fpn_channels", "stacked_convs",
             "imitation")  # fmt: skip


def compare(work: Work, engines: Sequence[Artifact], notes: Sequence[str]) -> Artifact:
    """Measure all engines that run here in turns, and put everything together.

    Args:
        work: detectors, and what they were judged on.
        engines: artifacts of `deploy.detectors.engines`.
        notes: on what was left out.
    """
    recipe = work.job.recipe.bench

    def make(folder: Path) -> None:
        measured = _measured(work, engines)
        document = DetectionReport(
            coco=work.wanted.coco,
            detector=work.wanted.detector,
            classes=list(work.data.classes),
            train_images=work.data.train.count,
            val_images=work.data.val.count,
            size=size_of(work.wanted),
            schedule=work.wanted.model_dump(mode="json", include=set(_SCHEDULE)),
            detectors=[_figures(name, own) for name, own in work.detectors.items()],
            engines=[one for artifact in engines for one in _engines(work, artifact)],
            latency=_latencies(work, engines, measured),
            pictures=pictures(
                work.data, {name: judge.read_predictions(own.folder) for name, own in work.detectors.items()}
            ),
            environment=environment().as_json(),
            notes=[*work.data.notes, *notes],
        )
        atomic_write(folder / DOCUMENT, (document.model_dump_json(indent=2) + "\n").encode())

    here = environment()
    inputs = {name: own.digest for name, own in work.detectors.items()}
    inputs |= {artifact.manifest.stage: artifact.digest for artifact in engines}
    inputs |= {"cpu": here.cpu, "cores": str(here.cores_usable), "gpus": ", ".join(gpu.name for gpu in here.gpus)}
    settings = {"batches": list(work.wanted.batches), "seconds": recipe.seconds, "rounds": recipe.rounds,
                "notes": list(notes)}  # fmt: skip
    return stage(work.job, f"{DETECT}/compare", settings, inputs, make)


def read_comparison(artifact: Artifact) -> DetectionReport:
    """The document of a `compare` artifact."""
    return DetectionReport.model_validate_json((artifact.folder / DOCUMENT).read_bytes())


def _figures(name: str, detector: Artifact) -> DetectorFigures:
    figures = figures_of(detector)
    return DetectorFigures(
        model=cast(Name, name),
        **{key: figures[key] for key in ("params", "backbone_params", "macs", "macs_800x1344")},
        pytorch=_in_percent(figures["pytorch"]),
        turned_ap=figures["turned"] and 100 * figures["turned"]["ap"],
        masks=None if figures["masks"] is None else _in_percent(figures["masks"]),
        agreement=None if figures["agreement"] is None else BoxAgreement(**figures["agreement"]),
    )


def _in_percent(own: Mapping[str, Any]) -> ApFigures:
    in_percent = {
        key: None if own[key] is None else 100 * own[key]
        for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    }
    classes = {kind: None if value is None else 100 * value for kind, value in own["per_class"].items()}
    return ApFigures.model_validate({**in_percent, "per_class": classes, "images": own["images"]})


def _engines(work: Work, artifact: Artifact) -> list[DetectorEngine]:
    found = []
    for name, record in read_json(artifact.folder / "ap.json").items():
        engine = engine_of(artifact, name)
        found.append(
            DetectorEngine(
                model=cast(Name, name),
                runtime=engine.runtime,
                precision=engine.precision,
                path=engine.path.relative_to(work.job.folder).as_posix(),
                bytes=engine.bytes,
                **record,
            )
        )
    return found


def _measured(work: Work, engines: Sequence[Artifact]) -> LatencyReport | None:
    """All engines that run here, in turns, on real images; named RUNTIME-PRECISION/MODEL as their folders are."""
    folders = {f"{a.folder.name}/{name}": a.folder / name for a in engines for name in work.detectors}
    folders = {name: folder for name, folder in folders.items() if runs_here(read_engine(folder))}
    if not folders:
        return None
    recipe = work.job.recipe.bench
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(runtime_named(read_engine(folder).runtime).open(folder))
            for name, folder in folders.items()
        }
        feeds = _feeds(work, next(iter(sessions.values())).input_names[0])
        pairs = max(1, len(sessions) // len(work.detectors))
        settings = BenchSettings(seconds=recipe.seconds * pairs, warmup=recipe.warmup, rounds=recipe.rounds)
        return interleave(sessions, feeds, settings, quiet=work.job.quiet)


def _feeds(work: Work, name: str) -> dict[int, dict[str, Pixels]]:
    info = read_info(next(iter(work.detectors.values())).folder / "detector")
    images = [one.pixels.numpy() for one in images_of(work.data.val, info, work.wanted, max(work.wanted.batches))]
    return {size: {name: np.stack([images[i % len(images)] for i in range(size)])} for size in work.wanted.batches}


def _latencies(work: Work, engines: Sequence[Artifact], measured: LatencyReport | None) -> list[DetectorLatency]:
    if measured is None:
        return []
    return [
        _latency(engine_of(artifact, next(iter(work.detectors))), artifact.folder.name, batch, measured)
        for artifact in engines
        if f"{artifact.folder.name}/{next(iter(work.detectors))}" in measured.stats
        for batch in work.wanted.batches
    ]


def _latency(engine: Engine, name: str, batch: int, measured: LatencyReport) -> DetectorLatency:
    medians: Mapping[str, float] = {
        model: measured.stats[f"{name}/{model}"][batch].median
        for model in ("dense", "pruned")
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
