"""The stages that make the small network, up to its ONNX file; `deploy/stages/engines.py` goes on from there.

The cut itself is in `deploy/stages/prune.py`.

Each takes artifacts, does one thing, and returns an artifact. A stage's settings are the part of the recipe that
decides its result; its inputs are the digests of what it reads.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from upvits import toolchain
from upvits.calib_data import proxy_images
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.measure.parity import check_parity, model_outputs, session_outputs
from upvits.deploy.recipe.request import Job, distill_settings
from upvits.deploy.runtimes import open_onnx
from upvits.deploy.stages.documents import Parities, TunedAccuracy
from upvits.deploy.stages.job import (
    accuracy_of,
    accuracy_record,
    model_input,
    parity_images,
    stage,
    validation_outputs,
    write_json,
)
from upvits.deploy.store.artifacts import Artifact, canonical_digest, file_digest
from upvits.deploy.store.documents import write_document
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.timm_config import architecture_of


def score(job: Job) -> Artifact:
    """1-score: the importance of every unit of the dense network."""
    settings = {
        **job.recipe.score.model_dump(),
        "seed": job.recipe.seed,
        "depth": job.may_shorten,
    }
    if job.recipe.score.method == "refined":  # measures around the cut, so the cut decides the result
        settings["cuts"] = job.recipe.plan.model_dump()
    return stage(job, "1-score", settings, job.inputs, lambda folder: scores_of(job).save(folder))


def scores_of(job: Job) -> Scores:
    """Measure them; nothing is written."""
    recipe = job.recipe.score
    needs_images = job.may_shorten or recipe.method not in ("magnitude", "random")
    return toolchain.score(
        job.dense,
        proxy_images(job.source, job.preprocess, recipe.num_images or 1, job.recipe.seed) if needs_images else None,
        method=recipe.method,
        cuts=None if job.first_plan is None else job.first_plan.widths,
        depth=job.may_shorten,
        batch_size=recipe.batch_size,
        seed=job.recipe.seed,
        quiet=job.quiet,
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
        tuned_accuracy = accuracy_record(accuracy_of(job, tuned, reference))
        write_document(folder / "accuracy.json", TunedAccuracy(after_distill=tuned_accuracy))
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
        write_document(folder / "parity.json", Parities(**parities))

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
