"""What the peers choose, asked in their own environment: called by `benchmarks/peers.py`, one process for each run.

Reads `model/` (config.json, model.safetensors), `images.safetensors` and `job.json` from a folder, and writes
`kept.json` there: for every pruning ratio asked for, the units that Torch-Pruning's pruner removes. Nothing is cut
here. Imports nothing of this project: torch-pruning wants an older timm than it does.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional


def attention(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """timm's attention without the assumption that heads fill the embedding, as Torch-Pruning's example patches it."""
    batch, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    x = functional.scaled_dot_product_attention(q, k, v)
    projected: Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))
    return projected


def build(folder: Path) -> nn.Module:
    """The network of a model folder, by this environment's timm."""
    config = json.loads((folder / "config.json").read_text())
    model: nn.Module = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def gradients(model: nn.Module, images: Tensor, labels: Tensor, criterion: str) -> None:
    """Leaves in `.grad` what the criterion reads: the loss's gradient, or the mean square of each image's gradient.

    `GroupHessianImportance.accumulate_grad` of 1.6.1 looks its sums up under another key than it stores them, and so
    keeps the last image alone. The sums are made here, as its documentation means them.
    """
    if criterion == "taylor":
        for chunk, answers in zip(torch.split(images, 16), torch.split(labels, 16), strict=True):
            functional.cross_entropy(model(chunk), answers).backward()  # type: ignore[no-untyped-call]
    if criterion == "hessian":
        parameters = list(model.parameters())
        squares = [torch.zeros_like(parameter) for parameter in parameters]
        for image, answer in zip(images, labels, strict=True):
            loss = functional.cross_entropy(model(image[None]), answer[None])
            for square, gradient in zip(squares, torch.autograd.grad(loss, parameters), strict=True):
                square += gradient**2 / len(images)
        for parameter, square in zip(parameters, squares, strict=True):
            parameter.grad = square


def importance(criterion: str) -> Any:
    """Torch-Pruning's own estimator."""
    known: Any = importlib.import_module("torch_pruning").importance
    makers = {
        "magnitude": lambda: known.GroupMagnitudeImportance(p=2),
        "taylor": known.GroupTaylorImportance,
        "hessian": known.GroupHessianImportance,
    }
    return makers[criterion]()


def removed_units(pruner: Any, names: dict[nn.Module, str]) -> dict[str, list[int]]:
    """What one step of the pruner would remove, by group name of this project."""
    removed: dict[str, list[int]] = {}
    pruner.current_step = 0
    pruner._scope_initial_channels = {}
    for group in pruner.step(interactive=True):
        for dep, units in group:
            name, out = names.get(dep.target.module, ""), pruner.DG.is_out_channel_pruning_fn(dep.handler)
            if name == "patch_embed.proj" and out:
                removed["embed"] = sorted(units)
            elif name.endswith(".mlp.fc1") and out:
                removed[name.removesuffix(".fc1")] = sorted(units)
            elif name.endswith(".attn.proj") and not out:
                removed[name.removesuffix(".proj")] = sorted(units)
    return removed


def make_pruner(model: nn.Module, example: Tensor, criterion: str, isomorphic: bool) -> Any:
    """Torch-Pruning's pruner as its ViT example sets it up: head dims, FFN units and the embedding, at one ratio."""
    tp: Any = importlib.import_module("torch_pruning")
    network: Any = model
    heads = {}
    for module in model.modules():
        for name in ("qkv", "q", "kv") if hasattr(module, "num_heads") else ():
            if isinstance(getattr(module, name, None), nn.Linear):
                heads[getattr(module, name)] = module.num_heads
    return tp.pruner.BasePruner(
        model,
        example,
        importance=importance(criterion),
        global_pruning=isomorphic,
        isomorphic=isomorphic,
        pruning_ratio=0.5,
        ignored_layers=[network.head],
        num_heads=heads,
        in_channel_groups={},  # the defaults are shared by all pruners of a process
        out_channel_groups={},
    )


def grid(pruner: Any, ratios: list[float]) -> list[dict[str, Any]]:
    """The units that one step of the pruner removes at every ratio."""
    names = {module: name for name, module in pruner.model.named_modules()}
    found = []
    for ratio in ratios:
        pruner.per_step_pruning_ratio = [0.0, ratio]  # what its constructor derives from `pruning_ratio`
        found.append({"ratio": ratio, "removed": removed_units(pruner, names)})
    return found


def main() -> None:
    """One job."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.manual_seed(job["seed"])
    tensors = load_file(folder / "images.safetensors")
    started = time.perf_counter()
    Attention.forward = attention
    model = build(folder / "model")
    gradients(model, tensors["images"], tensors["labels"], job["criterion"])
    pruner = make_pruner(model, tensors["images"][:1], job["criterion"], job["isomorphic"])
    if not isinstance(model, VisionTransformer):
        pruner.step()
        model(tensors["images"][:1])  # fails for PVTv2; were it to run, its units would have to be named below
        raise NotImplementedError(f"no names for the groups of a {type(model).__name__}")
    found = grid(pruner, job["ratios"])
    seconds = time.perf_counter() - started
    (folder / "kept.json").write_text(json.dumps({"seconds": seconds, "grid": found}))


if __name__ == "__main__":
    main()
