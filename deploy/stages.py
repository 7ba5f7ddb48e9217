"""The stages of a run: each takes artifacts, does one thing, and returns an artifact.

A stage's settings are the part of the recipe that decides its result; its inputs are the digests of what it reads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toolchain
from calib_data import DataSource, Images, Preprocess, batches, proxy_images
from calib_data.errors import UserError
from deploy.artifacts import Artifact, atomic_write, canonical_digest, file_digest, run_stage
from deploy.bench import BenchSettings, LatencyReport, interleave
from deploy.environment import environment
from deploy.export import export_onnx
from deploy.parity import TOLERANCES, Parity, check_parity, model_outputs, session_outputs
from deploy.precision import convert
from deploy.recipe import Recipe, distill_settings
from deploy.report import bench_figures
from deploy.runtimes import (
    BatchProfile,
    BuildOptions,
    Engine,
    Runtime,
    RuntimeChoice,
    open_onnx,
    read_engine,
    runtime_named,
)
from deploy.runtimes.nvinfer import device_here
from toolchain.checkpoints import weights_digest
from toolchain.evaluate import Accuracy, evaluate
from toolchain.models import label_names_of
from toolchain.scores import Scores
from toolchain.timm_config import architecture_of

MODELS: tuple[Literal["dense", "pruned"], ...] = ("dense", "pruned")
EVAL_BATCH = 64
VERSIONS = {"1-score": 1, "2-prune": 1, "3-distill": 1, "4-export": 1, "5-engine": 1, "6-bench": 1}
"""Raise a stage's number when its code gives other results: artifacts of the old code are then made again."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all stages of a run share.

    Attributes:
        recipe: resolved.
        folder: the run directory, held by this process.
        dense: the network to prune, in eval mode on the device of the run.
        like: the published model whose widths are wanted, or None.
        dense_digest: sha256 of its weights.
        runtimes: what engines are built for, and what was left out.
    """

    recipe: Recipe
    folder: Path
    dense: nn.Module
    like: nn.Module | None
    dense_digest: str
    source: DataSource
    preprocess: Preprocess
    runtimes: RuntimeChoice
    quiet: bool

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the network, the data and the preprocessing."""
        preprocess = json.dumps(asdict(self.preprocess), sort_keys=True)
        return {"dense": self.dense_digest, "data": self.source.digest, "preprocess": preprocess}


def score(job: Job) -> Artifact:
    """1-score: the importance of every unit of the dense network."""
    recipe = job.recipe.score

    def work(folder: Path) -> None:
        images = None
        if recipe.method in ("fisher", "kl"):
            images = proxy_images(job.source, job.preprocess, recipe.num_images or 1, job.recipe.seed)
        scores = toolchain.score(
            job.dense,
            images,
            method=recipe.method,
            batch_size=recipe.batch_size,
            seed=job.recipe.seed,
            quiet=job.quiet,
        )
        scores.save(folder)

    settings = {**recipe.model_dump(), "seed": job.recipe.seed}
    return _stage(job, "1-score", settings, job.inputs, work)


def prune(job: Job, scored: Artifact) -> Artifact:
    """2-prune: the plan, the network that it leaves, and what that costs before any training."""

    def work(folder: Path) -> None:
        plan = make_plan(job.recipe, job.dense, job.like, Scores.load(scored.folder), job.preprocess)
        (folder / "plan.json").write_text(plan.to_json())
        pruned = toolchain.prune(job.dense, plan)
        toolchain.save(pruned, folder / "model")
        dense = _accuracy(job, job.dense)
        save_file({"predictions": dense.predictions}, folder / "dense_predictions.safetensors")
        accuracy = {"dense": dense, "after_prune": _accuracy(job, pruned, dense.predictions)}
        _write_accuracy(folder, accuracy)

    return _stage(job, "2-prune", job.recipe.plan.model_dump(), {**job.inputs, "scores": scored.digest}, work)


def make_plan(
    recipe: Recipe, dense: nn.Module, like: nn.Module | None, scores: Scores, preprocess: Preprocess
) -> toolchain.PruningPlan:
    """The plan that a recipe asks for."""
    wanted = recipe.plan
    return toolchain.plan(
        dense,
        scores,
        ratio=wanted.ratio,
        target_macs=wanted.target_macs,
        target_params=wanted.target_params,
        like=like,
        align=wanted.align,
        components=wanted.components,
        input_size=preprocess.input_size,
    )


def distill(job: Job, pruned: Artifact) -> Artifact:
    """3-distill: the pruned network fine-tuned against its dense parent; continues after a kill."""
    settings = distill_settings(job.recipe)
    decisive = {name: value for name, value in asdict(settings).items() if name not in ("workers", "eval_every")}

    def work(folder: Path) -> None:
        if not (folder / "model").exists():
            student = toolchain.load(pruned.folder / "model")
            result = toolchain.distill(
                student,
                job.dense,
                job.source,
                job.preprocess,
                settings,
                folder,
                device=job.recipe.device,
                quiet=job.quiet,
            )
            toolchain.save(result.model.cpu(), folder / "model")
        tuned = toolchain.load(folder / "model").to(_device(job.dense))
        reference = load_file(pruned.folder / "dense_predictions.safetensors")["predictions"]
        _write_accuracy(folder, {"after_distill": _accuracy(job, tuned, reference)})
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    return _stage(job, "3-distill", decisive, {**job.inputs, "pruned": pruned.digest}, work, resumable=True)


def export(job: Job, pruned: Artifact, tuned: Artifact) -> Artifact:
    """4-export: both networks as ONNX, held against PyTorch on real images (exit code 4 when they differ)."""
    recipe = job.recipe.export

    def work(folder: Path) -> None:
        images = _parity_images(job)
        # on the CPU in full fp32: GPUs may compute convolutions in TF32, which no parity gate would let pass
        models = {"dense": copy.deepcopy(job.dense).cpu(), "pruned": toolchain.load(tuned.folder / "model")}
        reports, parities, reference = {}, {}, {}
        for name, model in models.items():
            path = folder / name / "model.onnx"
            report = export_onnx(
                model,
                path,
                job.preprocess,
                opset=recipe.opset,
                uint8_input=recipe.uint8_input,
                metadata=_metadata(job, model, name, pruned),
            )
            reports[name] = {**asdict(report), "path": f"{name}/model.onnx"}
            outputs = model_outputs(model, torch.split(images, 8))
            with open_onnx(path) as session:
                candidate = session_outputs(session, _session_inputs(job, images))
            parities[name] = check_parity(outputs, candidate, candidate_name="ONNX Runtime (CPU)", inputs=images)
            reference[name] = torch.from_numpy(outputs)
        save_file(reference, folder / "reference.safetensors")
        _write_json(
            folder / "export.json",
            {name: {k: v for k, v in r.items() if k != "seconds"} for name, r in reports.items()},
        )
        _write_json(folder / "parity.json", {name: parity.as_json() for name, parity in parities.items()})

    return _stage(job, "4-export", recipe.model_dump(), {**job.inputs, "tuned": _model_digest(tuned)}, work)


def _metadata(job: Job, model: nn.Module, name: str, pruned: Artifact) -> dict[str, str]:
    labels = job.source.class_names or label_names_of(job.dense)
    found = {"architecture": architecture_of(model), "variant": name, "model_digest": weights_digest(model)}
    if name == "pruned":
        found["plan_digest"] = file_digest(pruned.folder / "plan.json")
    return found if labels is None else {**found, "labels": json.dumps(list(labels))}


def engines(job: Job, exported: Artifact) -> list[Artifact]:
    """5-engine: an engine of both networks for every runtime and precision; checked where it can run here."""
    return [
        _engine(job, exported, runtime, precision)
        for runtime in job.runtimes.runtimes
        for precision in precisions_for(runtime, job.recipe.engine.precision)
    ]


def precisions_for(runtime: Runtime, spec: str) -> tuple[str, ...]:
    """Precisions to build: those asked for; by default fp32 on CPUs and fp16 elsewhere."""
    own = "fp32" if runtime.name == "onnxruntime" else "fp16"
    wanted = dict.fromkeys(own if name == "auto" else name for name in split_names(spec))
    return tuple(name for name in wanted if name in runtime.precisions)


def split_names(spec: str) -> list[str]:
    """Names in a list separated by commas."""
    return [name.strip() for name in spec.split(",") if name.strip()]


def _engine(job: Job, exported: Artifact, runtime: Runtime, precision: str) -> Artifact:
    recipe = job.recipe.engine
    options = BuildOptions(
        precision=precision,
        batch=_profile(job),
        targets=recipe.targets if runtime.name.startswith("tensorrt") else (),
        workspace_mib=recipe.workspace_mib,
    )

    def work(folder: Path) -> None:
        images = _parity_images(job)
        reference = load_file(exported.folder / "reference.safetensors")
        parities = {}
        for name in MODELS:
            onnx_path = exported.folder / name / "model.onnx"
            runtime.build(onnx_path, folder / name, options)
            parities[name] = _engine_parity(job, runtime, precision, folder / name, onnx_path, images, reference[name])
        _write_json(folder / "parity.json", {name: parity.as_json() for name, parity in parities.items()})

    settings = {"runtime": runtime.name, **asdict(options)}
    inputs = {"onnx": exported.digest, **_builder(runtime)}
    return _stage(job, f"5-engine/{runtime.name}-{precision}", settings, inputs, work)


def _builder(runtime: Runtime) -> dict[str, str]:
    """What makes an engine invalid elsewhere: library version, and the device where it is built for the one at hand."""
    here = environment()
    library = "tensorrt" if runtime.name.startswith("tensorrt") else "onnxruntime"
    versions = {name: version for name, version in here.libraries.items() if name.startswith(library)}
    # ONNX Runtime on the CPU is tuned to the cores that it may use
    device = (
        f"{here.cpu}, {here.cores_usable} cores"
        if runtime.name == "onnxruntime"
        else ", ".join(gpu.name for gpu in here.gpus)
    )
    return {"library": json.dumps(versions, sort_keys=True), "device": device}


def _engine_parity(
    job: Job, runtime: Runtime, precision: str, folder: Path, onnx_path: Path, images: Tensor, reference: Tensor
) -> Parity:
    """The engine against PyTorch; where it cannot run here, the graph that it was built from on ONNX Runtime."""
    if runs_here(read_engine(folder)):
        name = f"{runtime.name} {precision}"
        size = _profile(job).opt
        if size > 1:  # engines refuse batches below their smallest; only whole ones are compared
            images = images.repeat(-(-size // len(images)), 1, 1, 1)
            reference = reference.repeat(-(-size // len(reference)), 1)
        whole = len(images) // size * size
        images, reference = images[:whole], reference[:whole]
        with runtime.open(folder) as session:
            outputs = session_outputs(session, _session_inputs(job, images, size))
    else:
        name = f"{precision} graph for {runtime.name} (run by ONNX Runtime on the CPU)"
        converted = folder / "graph.onnx"
        onnx.save(convert(onnx.load(onnx_path), precision), converted)
        with open_onnx(converted) as session:
            outputs = session_outputs(session, _session_inputs(job, images))
        converted.unlink()
    return check_parity(reference.numpy(), outputs, tolerance=TOLERANCES[precision], candidate_name=name)


def bench(job: Job, built: Sequence[Artifact]) -> Artifact:
    """6-bench: latency of dense and pruned in turns, on every runtime that runs here."""
    recipe = job.recipe.bench

    def work(folder: Path) -> None:
        largest = max(recipe.batches)
        images = _parity_images(job)
        images = images[torch.arange(largest) % len(images)]
        measured: dict[tuple[str, str], LatencyReport] = {}
        for artifact in built:
            engine = engine_of(artifact, "dense")
            if not runs_here(engine):
                continue
            runtime = runtime_named(engine.runtime)
            with runtime.open(artifact.folder / "dense") as dense, runtime.open(artifact.folder / "pruned") as pruned:
                feeds = {b: {dense.input_names[0]: _session_inputs(job, images[:b], b)[0]} for b in recipe.batches}
                settings = BenchSettings(seconds=recipe.seconds, warmup=recipe.warmup, rounds=recipe.rounds)
                sessions = {"dense": dense, "pruned": pruned}
                measured[engine.runtime, engine.precision] = interleave(sessions, feeds, settings, quiet=job.quiet)
        atomic_write(folder / "latency.json", bench_figures(measured).model_dump_json(indent=2).encode())
        # threads stand with the latencies: each engine has its own
        sessions_used = {
            " ".join(key): {name: v for name, v in report.sessions["pruned"].items() if name != "intra_op_threads"}
            for key, report in measured.items()
        }
        _write_json(folder / "sessions.json", sessions_used)
        _write_json(folder / "environment.json", environment().as_json())

    inputs = {artifact.manifest.stage: artifact.digest for artifact in built}
    here = environment()
    device = {"cpu": here.cpu, "cores": str(here.cores_usable), "gpus": ", ".join(gpu.name for gpu in here.gpus)}
    return _stage(job, "6-bench", recipe.model_dump(), {**inputs, **device}, work)


def _stage(
    job: Job,
    name: str,
    settings: Mapping[str, object],
    inputs: Mapping[str, str],
    work: Callable[[Path], None],
    *,
    resumable: bool = False,
) -> Artifact:
    """`run_stage` in the job's directory, with a line about it on the terminal."""
    artifact = run_stage(
        job.folder, name, settings, inputs, work, version=VERSIONS[name.split("/")[0]], resumable=resumable
    )
    if not artifact.skipped:  # a report of what was there before would now be wrong
        for report in ("report.json", "report.md", "report.html"):
            (job.folder / report).unlink(missing_ok=True)
    took = "as before" if artifact.skipped else f"{artifact.manifest.seconds:.1f} s"
    Console(stderr=True, quiet=job.quiet).print(f"{name}: {took}", highlight=False)
    return artifact


def runs_here(engine: Engine) -> bool:
    """Whether this machine has what the engine's runtime needs, and a device that the engine was built for."""
    if runtime_named(engine.runtime).missing_to_run() is not None:
        return False
    return not engine.targets or device_here() in engine.targets


def _profile(job: Job) -> BatchProfile:
    return BatchProfile(*(int(part) for part in job.recipe.engine.batch.split(":")))


def _model_digest(artifact: Artifact) -> str:
    """Digest of an artifact's network alone; logs beside it hold times."""
    files = artifact.manifest.files.items()
    return canonical_digest({path: entry.sha256 for path, entry in files if path.startswith("model/")})


def engine_of(artifact: Artifact, name: str) -> Engine:
    """The record of one engine of an engine artifact."""
    return read_engine(artifact.folder / name)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _accuracy(job: Job, model: nn.Module, reference: Tensor | None = None) -> Accuracy:
    images = batches(job.source.val, job.preprocess, EVAL_BATCH, workers=job.recipe.distill.workers or 0)
    total = -(-len(job.source.val) // EVAL_BATCH)
    model = model.to(_device(job.dense))
    return evaluate(model, images, reference=reference, quiet=job.quiet, total=total)


def _write_accuracy(folder: Path, accuracies: Mapping[str, Accuracy]) -> None:
    document = {name: {"top1": a.top1, "agreement": a.agreement, "images": a.images} for name, a in accuracies.items()}
    _write_json(folder / "accuracy.json", document)


def _write_json(path: Path, document: object) -> None:
    atomic_write(path, (json.dumps(document, indent=2) + "\n").encode())


def _parity_images(job: Job) -> Tensor:
    """Some validation images [N, 3, H, W], as the network sees them."""
    val = job.source.val
    wanted = min(job.recipe.export.parity_images, len(val))
    if wanted == 0:
        raise UserError("The data have no validation images.", fix="Parity and latency are measured on real images.")
    # evenly spread, since folders come class by class
    positions = [index * len(val) // wanted for index in range(wanted)]
    chosen = Images([val.labels[i] for i in positions], lambda i: val[positions[i]][0])
    return torch.cat([images for images, _ in batches(chosen, job.preprocess, EVAL_BATCH)])


def _session_inputs(job: Job, images: Tensor, size: int = 8) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """Batches as the exported model takes them: normalised, or raw pixels with `uint8_input`."""
    if not job.recipe.export.uint8_input:
        return [batch.numpy() for batch in torch.split(images, size)]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (job.preprocess.mean, job.preprocess.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [batch.contiguous().numpy() for batch in torch.split(pixels, size)]
