"""4-export: both networks as ONNX files, held against PyTorch."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from upvits import toolchain
from upvits.calib_data.tensors import save_tensors
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.measure.parity import check_parity, model_outputs, session_outputs
from upvits.deploy.recipe.request import Job
from upvits.deploy.runtimes import open_onnx
from upvits.deploy.stages.documents import Parities
from upvits.deploy.stages.job import (
    model_input,
    parity_images,
    stage,
    validation_outputs,
    write_json,
)
from upvits.deploy.store.artifacts import Artifact, canonical_digest, file_digest
from upvits.deploy.store.documents import save_document
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.structure.timm_config import architecture_of


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
        save_tensors(reference, folder / "reference.safetensors")
        _save_accuracy_reference(job, folder)
        write_json(
            folder / "export.json",
            {name: {k: v for k, v in r.items() if k != "seconds"} for name, r in reports.items()},
        )
        save_document(folder / "parity.json", Parities(**parities))

    return stage(job, "4-export", recipe.model_dump(), {**job.inputs, "tuned": _model_digest(tuned)}, work)


def _save_accuracy_reference(job: Job, folder: Path) -> None:
    """What precisions are judged against: outputs of the fp32 graphs, just held against PyTorch, and the labels."""
    with open_onnx(folder / "dense/model.onnx") as dense, open_onnx(folder / "pruned/model.onnx") as pruned:
        outputs, labels = validation_outputs(job, {"dense": dense, "pruned": pruned})
    tensors = {name: torch.from_numpy(values) for name, values in {**outputs, "labels": labels}.items()}
    save_tensors(tensors, folder / "accuracy_reference.safetensors")


def _metadata(job: Job, model: nn.Module, name: str, pruned: Artifact) -> dict[str, str]:
    labels = job.source.class_names or label_names_of(job.dense)
    metadata = {"architecture": architecture_of(model), "variant": name, "model_digest": weights_digest(model)}
    if name == "pruned":
        metadata["plan_digest"] = file_digest(pruned.folder / "plan.json")
    return metadata if labels is None else {**metadata, "labels": json.dumps(list(labels))}


def _model_digest(artifact: Artifact) -> str:
    """Digest of an artifact's network alone; logs beside it hold times."""
    files = artifact.manifest.files.items()
    return canonical_digest({path: entry.sha256 for path, entry in files if path.startswith("model/")})
