"""The stages that make the small network, up to its ONNX file; `deploy/engine_stages.py` goes on from there.

Each takes artifacts, does one thing, and returns an artifact. A stage's settings are the part of the recipe that
decides its result; its inputs are the digests of what it reads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toolchain
from calib_data import Preprocess, batches, proxy_images
from deploy.artifacts import Artifact, canonical_digest, file_digest
from deploy.graphs.export import export_onnx
from deploy.job import EVAL_BATCH, Job, model_input, parity_images, stage, validation_outputs, write_json
from deploy.measure.parity import check_parity, model_outputs, session_outputs
from deploy.recipe import Recipe, distill_settings
from deploy.runtimes import open_onnx
from toolchain.checkpoints import weights_digest
from toolchain.evaluate import Accuracy, evaluate
from toolchain.models import label_names_of
from toolchain.scores import Scores
from toolchain.timm_config import architecture_of


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
    return stage(job, "1-score", settings, job.inputs, work)


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

    return stage(job, "2-prune", job.recipe.plan.model_dump(), {**job.inputs, "scores": scored.digest}, work)


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
        tuned = toolchain.load(folder / "model").to(job.device)
        reference = load_file(pruned.folder / "dense_predictions.safetensors")["predictions"]
        _write_accuracy(folder, {"after_distill": _accuracy(job, tuned, reference)})
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    return stage(job, "3-distill", decisive, {**job.inputs, "pruned": pruned.digest}, work, resumable=True)


def export(job: Job, pruned: Artifact, tuned: Artifact) -> Artifact:
    """4-export: both networks as ONNX, held against PyTorch on real images (exit code 4 when they differ)."""
    recipe = job.recipe.export

    def work(folder: Path) -> None:
        images = parity_images(job)
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
                external_data=recipe.external_data,
                metadata=_metadata(job, model, name, pruned),
            )
            reports[name] = {**asdict(report), "path": f"{name}/model.onnx"}
            outputs = model_outputs(model, torch.split(images, 8))
            with open_onnx(path) as session:
                candidate = session_outputs(session, [model_input(job, batch) for batch in torch.split(images, 8)])
            parities[name] = check_parity(outputs, candidate, candidate_name="ONNX Runtime (CPU)", inputs=images)
            reference[name] = torch.from_numpy(outputs)
        save_file(reference, folder / "reference.safetensors")
        _save_accuracy_reference(job, folder)
        write_json(
            folder / "export.json",
            {name: {k: v for k, v in r.items() if k != "seconds"} for name, r in reports.items()},
        )
        write_json(folder / "parity.json", {name: parity.as_json() for name, parity in parities.items()})

    return stage(job, "4-export", recipe.model_dump(), {**job.inputs, "tuned": _model_digest(tuned)}, work)


def _save_accuracy_reference(job: Job, folder: Path) -> None:
    """What precisions are judged against: outputs of the fp32 graphs, just held against PyTorch, and the labels."""
    with open_onnx(folder / "dense/model.onnx") as dense, open_onnx(folder / "pruned/model.onnx") as pruned:
        outputs, labels = validation_outputs(job, {"dense": dense, "pruned": pruned})
    tensors = {name: torch.from_numpy(values) for name, values in {**outputs, "labels": labels}.items()}
    save_file(tensors, folder / "accuracy_reference.safetensors")


def _metadata(job: Job, model: nn.Module, name: str, pruned: Artifact) -> dict[str, str]:
    labels = job.source.class_names or label_names_of(job.dense)
    found = {"architecture": architecture_of(model), "variant": name, "model_digest": weights_digest(model)}
    if name == "pruned":
        found["plan_digest"] = file_digest(pruned.folder / "plan.json")
    return found if labels is None else {**found, "labels": json.dumps(list(labels))}


def _model_digest(artifact: Artifact) -> str:
    """Digest of an artifact's network alone; logs beside it hold times."""
    files = artifact.manifest.files.items()
    return canonical_digest({path: entry.sha256 for path, entry in files if path.startswith("model/")})


def _accuracy(job: Job, model: nn.Module, reference: Tensor | None = None) -> Accuracy:
    images = batches(job.source.val, job.preprocess, EVAL_BATCH, workers=job.recipe.distill.workers or 0)
    total = -(-len(job.source.val) // EVAL_BATCH)
    return evaluate(model.to(job.device), images, reference=reference, quiet=job.quiet, total=total)


def _write_accuracy(folder: Path, accuracies: Mapping[str, Accuracy]) -> None:
    document = {name: {"top1": a.top1, "agreement": a.agreement, "images": a.images} for name, a in accuracies.items()}
    write_json(folder / "accuracy.json", document)
