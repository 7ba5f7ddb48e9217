"""Prunes a network of your own program, step by step, in memory.

    python examples/own_model.py --data imagefolder:photos --out small

Replace `own_network` by your own code. What comes out is a folder with the small network, which timm alone loads, and
an ONNX file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import nn

from upvits import toolchain
from upvits.calib_data import demo_weights, open_data, proxy_images
from upvits.deploy.graphs.export import export_onnx
from upvits.toolchain.compensation import compress


def own_network() -> nn.Module:
    """Yours: a trained ViT or PVTv2 of timm. Here a checkpoint of the demo stands in for it."""
    prepared = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    model: nn.Module = timm.create_model("pvt_v2_b0", num_classes=12, pretrained_cfg_overlay=prepared)
    model.load_state_dict(load_file(demo_weights("pvt_v2_b0") / "model.safetensors"))
    return model.eval()


def main() -> None:
    """Score, plan, prune, fine-tune, save, export."""
    parser = argparse.ArgumentParser(description="Prune a network of your own program.")
    parser.add_argument("--data", default="demo", help="images, like --data of upvits-deploy")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of every dimension to remove")
    parser.add_argument("--images", type=int, default=512, help="training images to score and refit on")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning; 0 skips it")
    parser.add_argument("--out", type=Path, default=Path("small"), help="folder to make")
    arguments = parser.parse_args()

    model, data = own_network(), open_data(arguments.data)
    preprocess = toolchain.preprocess_of(model)
    images = proxy_images(data, preprocess, arguments.images)
    scores = toolchain.score(model, images)
    plan = toolchain.plan(model, scores, ratio=arguments.ratio)
    small = compress(model, plan, images).model
    if arguments.epochs:
        settings = toolchain.DistillSettings(epochs=arguments.epochs, batch_size=32, lr=3e-3)
        small = toolchain.distill(small, model, data, preprocess, settings).model
    toolchain.save(small, arguments.out)
    export_onnx(small, arguments.out / "model.onnx", preprocess)
    print(f"{toolchain.count_params(model):,} parameters became {toolchain.count_params(small):,}: {arguments.out}")


if __name__ == "__main__":
    main()
