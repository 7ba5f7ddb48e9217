"""5-engine: engines from ONNX graphs, held against what they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from upvits.calib_data.cache import cache_folder
from upvits.calib_data.errors import GateError
from upvits.deploy.choices import MODELS
from upvits.deploy.graphs.files import load_model
from upvits.deploy.machine.environment import builder_facts
from upvits.deploy.measure.parity import TOLERANCES, Parity, measure_parity, require_parity, session_outputs
from upvits.deploy.precision import QUANTIZED, for_cpu
from upvits.deploy.recipe.request import Job
from upvits.deploy.runtimes import (
    BuildOptions,
    Engine,
    Runtime,
    open_model,
    read_engine,
    runtime_named,
)
from upvits.deploy.runtimes.nvinfer import device_here
from upvits.deploy.stages.documents import Parities
from upvits.deploy.stages.job import Pixels, model_input, parity_images, stage
from upvits.deploy.stages.precision import graph_name, holds
from upvits.deploy.store.artifacts import Artifact
from upvits.deploy.store.documents import load_document, save_document


@dataclass(frozen=True, slots=True)
class Engines:
    """Engine artifacts, and a note for each precision that `auto` had to leave out."""

    artifacts: tuple[Artifact, ...] = ()
    left_out: tuple[str, ...] = ()


def build_engines(job: Job, exported: Artifact, graphs: Mapping[str, Artifact]) -> Engines:
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
        save_document(folder / "parity.json", Parities(**parities))

    settings = {"runtime": runtime.name, **asdict(options)}
    return stage(job, f"5-engine/{runtime.name}-{precision}", settings, {"onnx": graph.digest, **builder}, work)


def timing_cache(builder: Mapping[str, str]) -> Path:
    """Where a builder's timings are kept between runs: they hold for one library version and one device."""
    return cache_folder() / f"{hashlib.sha256(json.dumps(builder, sort_keys=True).encode()).hexdigest()[:16]}.timing"


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
    for parity in load_document(artifact.folder / "parity.json", Parities).by_model.values():
        require_parity(parity)


def _graph_outputs(onnx_path: Path, fed: Sequence[Pixels]) -> np.ndarray[Any, Any]:
    with open_model(for_cpu(load_model(onnx_path))) as session:
        return session_outputs(session, fed)


def runs_here(engine: Engine) -> bool:
    """Whether this machine has what the engine's runtime needs, and a device that the engine was built for."""
    if runtime_named(engine.runtime).missing_to_run() is not None:
        return False
    return not engine.targets or device_here() in engine.targets


def engine_of(artifact: Artifact, name: str) -> Engine:
    """The record of one engine of an engine artifact."""
    return read_engine(artifact.folder / name)
