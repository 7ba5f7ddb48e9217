"""6-bench: accuracy and latency of the engines that run on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from upvits.calib_data.errors import GateError
from upvits.deploy.choices import MODELS
from upvits.deploy.machine.environment import environment
from upvits.deploy.machine.gpu_monitor import GpuMonitor
from upvits.deploy.measure.accuracy import Accuracy, accuracy
from upvits.deploy.measure.bench import BenchSettings, LatencyReport, interleave, joules_per_image, throughput
from upvits.deploy.measure.document import Throughput
from upvits.deploy.measure.figures import EnginePair, bench_figures, findings, layer_figures
from upvits.deploy.recipe.request import Job
from upvits.deploy.runtimes import (
    LayerTime,
    RunOptions,
    Session,
    read_engine,
    runtime_named,
)
from upvits.deploy.stages.documents import EngineAccuracies, EngineAccuracy
from upvits.deploy.stages.engines import engine_of, runs_here
from upvits.deploy.stages.job import Pixels, model_input, parity_images, stage, validation_outputs, write_json
from upvits.deploy.store.artifacts import Artifact, atomic_write
from upvits.deploy.store.documents import load_document, save_document
from upvits.toolchain.planning import PruningPlan

_PROFILED_CALLS = 20
_THROUGHPUT_SECONDS = 3.0


def bench(job: Job, pruned: Artifact, exported: Artifact, built: Sequence[Artifact]) -> Artifact:
    """6-bench: accuracy and latency of all engines that run here, dense and pruned, all in turns."""
    recipe = job.recipe.bench

    def work(folder: Path) -> None:
        pairs = {pair: artifact for artifact in built if (pair := _pair(artifact)) is not None}
        options = RunOptions(cuda_graph=recipe.cuda_graph)
        with ExitStack() as stack:
            sessions = {
                pair.session(model): stack.enter_context(_open(artifact.folder / model, options))
                for pair, artifact in pairs.items()
                for model in MODELS
            }
            costs = _accuracies(job, exported, pairs, sessions)
            save_document(folder / "accuracy.json", _accuracy_record(pairs, costs))
            feeds = _feeds(job, sessions)
            settings = BenchSettings(
                seconds=recipe.seconds * max(1, len(pairs)), warmup=recipe.warmup, rounds=recipe.rounds
            )
            with GpuMonitor() as monitor:
                same = dict.fromkeys(sessions, feeds)
                measured = interleave(sessions, same, settings, quiet=job.quiet) if sessions else None
            joules = _energy(pairs, sessions, feeds) if monitor.samples else {}
            layers = _layers(pairs, sessions, feeds)
        plan = PruningPlan.load(pruned.folder / "plan.json")
        engines = {
            pair: (engine_of(artifact, "dense"), engine_of(artifact, "pruned")) for pair, artifact in pairs.items()
        }
        figures = bench_figures(measured, list(pairs), costs, job.recipe.precision.max_drop, joules)
        figures = figures.model_copy(
            update={
                "layer_times": [layer_figures(pair, max(feeds), *layers[pair]) for pair in pairs],
                "findings": findings(figures, plan, engines, layers),
                "throughput": _throughputs(job, pairs, feeds),
                "gpu": monitor.as_json(),
            }
        )
        atomic_write(folder / "latency.json", figures.model_dump_json(indent=2).encode())
        write_json(folder / "sessions.json", _settings_used(measured, pairs))
        write_json(folder / "environment.json", environment().as_json())

    # the export holds what accuracy is judged against, the plan what findings speak of
    inputs = {"export": exported.digest, "pruned": pruned.digest}
    inputs |= {artifact.manifest.stage: artifact.digest for artifact in built}
    here = environment()
    device = {"cpu": here.cpu, "cores": str(here.cores_usable), "gpus": ", ".join(gpu.name for gpu in here.gpus)}
    settings = {**recipe.model_dump(), "max_drop": job.recipe.precision.max_drop}
    artifact = stage(job, "6-bench", settings, {**inputs, **device}, work)
    _require_accuracy(job, artifact)
    return artifact


def _require_accuracy(job: Job, benched: Artifact) -> None:
    """The gate `--max-drop` for engines in a precision that was asked for by name, on what they were measured to lose.

    Raises:
        GateError: names the engine and its loss.
    """
    limit = job.recipe.precision.max_drop
    for engine in load_document(benched.folder / "accuracy.json", EngineAccuracies, strict=False).engines:
        cost = engine.accuracy
        if engine.precision in job.recipe.engine.precision and cost.loses_more_than(limit):
            raise GateError(
                f"the engine {engine.model} {engine.runtime} {engine.precision} loses {cost.drop:.2f} points, "
                f"{limit:g} are allowed",
                why=f"Measured on {cost.images} validation images, with a standard error of {cost.drop_error:.2f} "
                "points; its graph kept the limit.",
                fix="Allow more with --max-drop, or leave this precision out.",
            )


def _pair(artifact: Artifact) -> EnginePair | None:
    """What an engine artifact is measured as; None where it cannot run here."""
    engine = engine_of(artifact, "pruned")
    return EnginePair(engine.runtime, engine.precision) if runs_here(engine) else None


def _open(folder: Path, options: RunOptions) -> Session:
    return runtime_named(read_engine(folder).runtime).open(folder, options)


def _accuracies(
    job: Job, exported: Artifact, pairs: Mapping[EnginePair, Artifact], sessions: Mapping[str, Session]
) -> dict[str, Accuracy]:
    """Every session on the validation images, which are decoded once for all."""
    if not sessions:
        return {}
    outputs, labels = validation_outputs(job, sessions, job.recipe.engine.batch.opt)
    reference = load_file(exported.folder / "accuracy_reference.safetensors")
    accuracies = {
        pair.session(model): accuracy(reference[model], outputs[pair.session(model)], labels, pair.session(model))
        for pair in pairs
        for model in MODELS
    }
    return accuracies


def _accuracy_record(pairs: Iterable[EnginePair], costs: Mapping[str, Accuracy]) -> EngineAccuracies:
    return EngineAccuracies(
        engines=tuple(
            EngineAccuracy(
                model=model,
                runtime=pair.runtime,
                precision=pair.precision,
                accuracy=costs[pair.session(model)],
            )
            for pair in pairs
            for model in MODELS
        )
    )


def _feeds(job: Job, sessions: Mapping[str, Session]) -> dict[int, dict[str, Pixels]]:
    """Real images by batch size; decoded once."""
    images = parity_images(job)
    name = next(iter(sessions.values())).input_names[0] if sessions else "images"
    sizes = job.recipe.bench.batches
    return {size: {name: model_input(job, images[torch.arange(size) % len(images)])} for size in sizes}


def _throughputs(
    job: Job, pairs: Mapping[EnginePair, Artifact], feeds: Mapping[int, Mapping[str, Pixels]]
) -> list[Throughput]:
    """Images per second of several sessions at once; one of them alone is in the latencies already."""
    recipe = job.recipe.bench
    figures = []
    for streams in (count for count in recipe.streams if count > 1):
        for pair, artifact in pairs.items():
            for model in MODELS:
                options = RunOptions(threads=1, cuda_graph=recipe.cuda_graph)
                feed = feeds[max(feeds)]
                rate = throughput(lambda: _open(artifact.folder / model, options), feed, streams, _THROUGHPUT_SECONDS)  # noqa: B023
                figures.append(
                    Throughput(
                        model=model,
                        runtime=pair.runtime,
                        precision=pair.precision,
                        batch=max(feeds),
                        streams=streams,
                        images_per_s=rate,
                    )
                )
    return figures


def _layers(
    pairs: Mapping[EnginePair, Artifact], sessions: Mapping[str, Session], feeds: Mapping[int, Mapping[str, Pixels]]
) -> dict[EnginePair, tuple[tuple[LayerTime, ...], tuple[LayerTime, ...]]]:
    """Profiles of both networks at the largest batch; empty where a runtime has no profiler."""
    feed = feeds[max(feeds)]
    return {
        pair: (
            sessions[pair.session("dense")].layer_times(feed, _PROFILED_CALLS),
            sessions[pair.session("pruned")].layer_times(feed, _PROFILED_CALLS),
        )
        for pair in pairs
    }


def _energy(
    pairs: Mapping[EnginePair, Artifact], sessions: Mapping[str, Session], feeds: Mapping[int, Mapping[str, Pixels]]
) -> dict[tuple[str, int], float | None]:
    """Energy per image of every session on a GPU, by session and batch size."""
    return {
        (pair.session(model), batch): joules_per_image(sessions[pair.session(model)], feed)
        for pair in pairs
        if not runtime_named(pair.runtime).on_cpu
        for model in MODELS
        for batch, feed in feeds.items()
    }


def _settings_used(measured: LatencyReport | None, pairs: Mapping[EnginePair, Artifact]) -> dict[str, dict[str, Any]]:
    """What sessions ran with, by pair; threads stand with the latencies, since each engine has its own."""
    if measured is None:
        return {}
    return {
        f"{pair.runtime} {pair.precision}": {
            name: value
            for name, value in measured.sessions[pair.session("pruned")].items()
            if name != "intra_op_threads"
        }
        for pair in pairs
    }
