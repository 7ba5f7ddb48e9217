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

import upvits
from upvits.calib_data import demo_weights


def own_network() -> nn.Module:
    """Yours: a trained ViT or PVTv2 of timm. Here a checkpoint of the demo stands in for it."""
    checkpoint = demo_weights("pvt_v2_b0")
    assert checkpoint is not None
    images = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    model: nn.Module = timm.create_model("pvt_v2_b0", num_classes=12, pretrained_cfg_overlay=images)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model.eval()


def main() -> None:
    """Score, plan, prune, fine-tune, save, export."""
    parser = argparse.ArgumentParser(description="Prune a network of your own program.")
    parser.add_argument("--data", default="demo", help="images, like --data of upvits-deploy")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of every dimension to remove")
    parser.add_argument("--images", type=int, default=512, help="training images to score and refit on")
    parser.add_argument("--no-fine-tuning", action="store_true", help="stop after the cut")
    parser.add_argument("--out", type=Path, default=Path("small"), help="folder to make")
    arguments = parser.parse_args()

    model, data = own_network(), upvits.open_data(arguments.data)
    images = upvits.calibration_images(model, data, arguments.images)
    plan = upvits.plan(model, upvits.score(model, images), ratio=arguments.ratio)
    small = upvits.prune(model, plan, images)
    if not arguments.no_fine_tuning:
        small = upvits.distill(small, model, data).model

    upvits.save(small, arguments.out)
    upvits.export(small, arguments.out / "model.onnx")
    before, after = upvits.accuracy(model, data).top1, upvits.accuracy(small, data).top1
    print(f"{upvits.count_params(model):,} parameters became {upvits.count_params(small):,}")
    print(f"{before:.2f} % top-1 became {after:.2f} %")
    print(f"The small network is in {arguments.out}")


if __name__ == "__main__":
    main()
