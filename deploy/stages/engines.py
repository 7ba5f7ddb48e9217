"""The stages that build engines from ONNX graphs, and measure those that run on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from upvits.calib_data.errors import GateError
from upvits.deploy.graphs.files import load_model
from upvits.deploy.machine.environment import builder_facts, environment
from upvits.deploy.machine.gpu_monitor import GpuMonitor
from upvits.deploy.measure.accuracy import Accuracy, accuracy
from upvits.deploy.measure.bench import BenchSettings, LatencyReport, interleave, joules_per_image, throughput
from upvits.deploy.measure.document import Throughput
from upvits.deploy.measure.figures import Pair, bench_figures, findings, layer_figures
from upvits.deploy.measure.parity import TOLERANCES, Parity, measure_parity, require_parity, session_outputs
from upvits.deploy.precision import QUANTIZED, for_cpu
from upvits.deploy.recipe.request import Job
from upvits.deploy.runtimes import (
    BuildOptions,
    Engine,
    LayerTime,
    RunOptions,
    Runtime,
    Session,
    open_model,
    read_engine,
    runtime_named,
)
from upvits.deploy.runtimes.nvinfer import device_here
from upvits.deploy.stages.documents import EngineAccuracies, EngineAccuracy, Parities
from upvits.deploy.stages.job import (
    MODELS,
    Pixels,
    model_input,
    parity_images,
    stage,
    validation_outputs,
    write_json,
)
from upvits.deploy.stages.precision import graph_name, holds
from upvits.deploy.store.artifacts import Artifact, atomic_write
from upvits.deploy.store.documents import read_document, write_document
from upvits.toolchain.planning import PruningPlan

_PROFILED_CALLS = 20
_THROUGHPUT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Engines:
    """Engine artifacts, and a note for each precision that `auto` had to leave out."""

    artifacts: tuple[Artifact, ...] = ()
    left_out: tuple[str, ...] = ()


def engines(job: Job, exported: Artifact, graphs: Mapping[str, Artifact]) -> Engines:
    """5-engine: an engine of both networks for every runtime and precision; checked where it can run here.

    Raises:
        GateError: an engine is not what its graph asks for, or computes something else. A quantized one that computes
            something else and that nobody asked for by name is left out instead.
    """
    asked = job.recipe.engine.precision
    built, left_out = [], []
    for runtime, precision in job.engines:
        graph = graphs.get(graph_name(runtime, precision), exported)
        if graph is not exported and not holds(graph, job.recipe.precision.max_drop):
            continue
        artifact = _engine(job, exported, graph, runtime, precision)
        try:
            _require_parity(artifact)
        except GateError as error:
            if precision not in QUANTIZED or precision in asked:
                raise
            left_out.append(f"{runtime.name} {precision} was left out: {error.what}. {error.why}")
        else:
            built.append(artifact)
    return Engines(tuple(built), tuple(left_out))


def _engine(job: Job, exported: Artifact, graph: Artifact, runtime: Runtime, precision: str) -> Artifact:
    recipe = job.recipe.engine
    options = BuildOptions(
        precision=precision,
        batch=recipe.batch,
        targets=recipe.targets if runtime.has_targets else (),
        workspace_mib=recipe.workspace_mib,
        require_fused_attention=recipe.require_fused_attention,
    )
    builder = builder_facts(runtime.libraries, on_cpu=runtime.on_cpu)

    def work(folder: Path) -> None:
        images = parity_images(job)
        reference = load_file(exported.folder / "reference.safetensors")
        parities = {}
        for name in MODELS:
            onnx_path = graph.folder / name / "model.onnx"
            runtime.build(onnx_path, folder / name, replace(options, timing_cache=timing_cache(builder)))
            parities[name] = _parity(job, runtime, precision, folder / name, onnx_path, images, reference[name])
        write_document(folder / "parity.json", Parities(**parities))

    settings = {"runtime": runtime.name, **asdict(options)}
    return stage(job, f"5-engine/{runtime.name}-{precision}", settings, {"onnx": graph.digest, **builder}, work)


def timing_cache(builder: Mapping[str, str]) -> Path:
    """Where a builder's timings are kept between runs: they hold for one library version and one device."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upvits-deploy"
    return home / f"{hashlib.sha256(json.dumps(builder, sort_keys=True).encode()).hexdigest()[:16]}.timing"


def _parity(
    job: Job,
    runtime: Runtime,
    precision: str,
    folder: Path,
    onnx_path: Path,
    images: torch.Tensor,
    reference: np.ndarray[Any, Any],
) -> Parity | None:
    """The engine against PyTorch; where it cannot run here, the graph that it was built from on ONNX Runtime.

    A quantized engine is held against its graph: what quantization itself costs was judged by `--max-drop` before. None
    where there is nothing to hold against each other.
    """
    size, here = job.recipe.engine.batch.opt, runs_here(read_engine(folder))
    if precision in QUANTIZED and not here:
        return None
    # engines refuse batches below their smallest; only whole ones are compared
    images = images.repeat(-(-size // len(images)), 1, 1, 1)
    reference = np.tile(reference, (-(-size // len(reference)), 1))
    whole = len(images) // size * size
    images, reference = images[:whole], reference[:whole]
    fed = [model_input(job, batch) for batch in torch.split(images, size)]
    reference_name = "PyTorch"
    if precision in QUANTIZED:
        reference, reference_name = _graph_outputs(onnx_path, fed), f"its {precision} graph on ONNX Runtime (CPU)"
    if here:
        with runtime.open(folder) as session:
            candidate, name = session_outputs(session, fed), f"{runtime.name} {precision}"
    else:
        name = f"{precision} graph for {runtime.name} (run by ONNX Runtime on the CPU)"
        candidate = _graph_outputs(onnx_path, fed)
    tolerance = TOLERANCES[precision]
    return measure_parity(reference, candidate, tolerance=tolerance, reference_name=reference_name, candidate_name=name)


def _require_parity(artifact: Artifact) -> None:
    """The gate, on what the stage measured; it holds for an artifact of an earlier run too."""
    for parity in read_document(artifact.folder / "parity.json", Parities).by_model.values():
        require_parity(parity)


def _graph_outputs(onnx_path: Path, fed: Sequence[Pixels]) -> np.ndarray[Any, Any]:
    with open_model(for_cpu(load_model(onnx_path))) as session:
        return session_outputs(session, fed)


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
            write_document(folder / "accuracy.json", _accuracy_record(pairs, costs))
            feeds = _feeds(job, sessions)
            settings = BenchSettings(
                seconds=recipe.seconds * max(1, len(pairs)), warmup=recipe.warmup, rounds=recipe.rounds
            )
            with GpuMonitor() as monitor:
                measured = interleave(sessions, feeds, settings, quiet=job.quiet) if sessions else None
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
    for engine in read_document(benched.folder / "accuracy.json", EngineAccuracies).engines:
        cost = engine.accuracy
        if engine.precision in job.recipe.engine.precision and cost.drop > limit:
            raise GateError(
                f"the engine {engine.model} {engine.runtime} {engine.precision} loses {cost.drop:.2f} points, "
                f"{limit:g} are allowed",
                why=f"Measured on {cost.images} validation images; its graph kept the limit.",
                fix="Allow more with --max-drop, or leave this precision out.",
            )


def runs_here(engine: Engine) -> bool:
    """Whether this machine has what the engine's runtime needs, and a device that the engine was built for."""
    if runtime_named(engine.runtime).missing_to_run() is not None:
        return False
    return not engine.targets or device_here() in engine.targets


def engine_of(artifact: Artifact, name: str) -> Engine:
    """The record of one engine of an engine artifact."""
    return read_engine(artifact.folder / name)


def _pair(artifact: Artifact) -> Pair | None:
    """What an engine artifact is measured as; None where it cannot run here."""
    engine = engine_of(artifact, "pruned")
    return Pair(engine.runtime, engine.precision) if runs_here(engine) else None


def _open(folder: Path, options: RunOptions) -> Session:
    return runtime_named(read_engine(folder).runtime).open(folder, options)


def _accuracies(
    job: Job, exported: Artifact, pairs: Mapping[Pair, Artifact], sessions: Mapping[str, Session]
) -> dict[str, Accuracy]:
    """Every session on the validation images, which are decoded once for all."""
    if not sessions:
        return {}
    outputs, labels = validation_outputs(job, sessions, job.recipe.engine.batch.opt)
    reference = load_file(exported.folder / "accuracy_reference.safetensors")
    found = {
        pair.session(model): accuracy(reference[model], outputs[pair.session(model)], labels, pair.session(model))
        for pair in pairs
        for model in MODELS
    }
    return found


def _accuracy_record(pairs: Iterable[Pair], costs: Mapping[str, Accuracy]) -> EngineAccuracies:
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
    job: Job, pairs: Mapping[Pair, Artifact], feeds: Mapping[int, Mapping[str, Pixels]]
) -> list[Throughput]:
    """Images per second of several sessions at once; one of them alone is in the latencies already."""
    recipe = job.recipe.bench
    found = []
    for streams in (count for count in recipe.streams if count > 1):
        for pair, artifact in pairs.items():
            for model in MODELS:
                options = RunOptions(threads=1, cuda_graph=recipe.cuda_graph)
                feed = feeds[max(feeds)]
                rate = throughput(lambda: _open(artifact.folder / model, options), feed, streams, _THROUGHPUT_SECONDS)  # noqa: B023
                found.append(
                    Throughput(
                        model=model,
                        runtime=pair.runtime,
                        precision=pair.precision,
                        batch=max(feeds),
                        streams=streams,
                        images_per_s=rate,
                    )
                )
    return found


def _layers(
    pairs: Mapping[Pair, Artifact], sessions: Mapping[str, Session], feeds: Mapping[int, Mapping[str, Pixels]]
) -> dict[Pair, tuple[tuple[LayerTime, ...], tuple[LayerTime, ...]]]:
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
    pairs: Mapping[Pair, Artifact], sessions: Mapping[str, Session], feeds: Mapping[int, Mapping[str, Pixels]]
) -> dict[tuple[str, int], float | None]:
    """Energy per image of every session on a GPU, by session and batch size."""
    return {
        (pair.session(model), batch): joules_per_image(sessions[pair.session(model)], feed)
        for pair in pairs
        if not runtime_named(pair.runtime).on_cpu
        for model in MODELS
        for batch, feed in feeds.items()
    }


def _settings_used(measured: LatencyReport | None, pairs: Mapping[Pair, Artifact]) -> dict[str, dict[str, Any]]:
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
