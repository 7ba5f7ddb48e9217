"""A trained detector as ONNX, in three shapes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

from onnx import ModelProto
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.deploy.detectors.graph import BOX_OUTPUTS, LEVEL_OUTPUTS, with_outputs
from upvits.deploy.detectors.suppression import limits_of, with_suppression
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.graphs.files import load_model, save_model
from upvits.deploy.recipe.detect import size_for
from upvits.deploy.store.drafts import scratch_folder
from upvits.detection.configs import LARGEST_SIDE
from upvits.detection.decode import DecodedBoxes
from upvits.detection.detector import DetectorInfo, load_detector

Shape = Literal["raw", "decode", "decode+nms"]
"""`raw`: logits and deltas of every level; `decode`: a fixed number of boxes, scores and labels; `decode+nms`: only
boxes that overlap no better one of their class, those of all images one after the other."""

SHAPES: tuple[Shape, ...] = get_args(Shape)


def parse_shape(text: str) -> Shape:
    """The shape of this name.

    Raises:
        UserError: there is none.
    """
    for shape in SHAPES:
        if shape == text:
            return shape
    raise UserError(f"Unknown shape {text!r}.", fix=f"Choose one of {', '.join(SHAPES)}.")


def export_folder(
    folder: Path, path: Path, shape: Shape = "decode", *, size: tuple[int, int] | None = None, uint8_input: bool = False
) -> None:
    """Write the detector in a folder as ONNX; images have the size of its training by default. Args: `export_detector`.

    Raises:
        UserError: there is no detector, the file exists, or `size` is larger than any detector takes.
    """
    if max(size or (0,)) > LARGEST_SIDE:
        raise UserError(f"`size=` has more than {LARGEST_SIDE:,} pixels.", fix="Give a smaller one.")
    if path.exists():
        raise UserError(f"{path} exists.", why="Nothing is overwritten.", fix="Choose another -o.")
    detector, info = load_detector(folder)
    export_detector(detector, info, path, size or size_for(info.scale), shape=shape, uint8_input=uint8_input)


def export_detector(
    detector: nn.Module,
    info: DetectorInfo,
    path: Path,
    size: tuple[int, int],
    *,
    shape: Shape = "decode",
    opset: int = 20,
    uint8_input: bool = False,
) -> None:
    """Write a RetinaNet as ONNX with a dynamic batch and images of one size.

    Inputs are as of `export_onnx`: `images`, float32 [batch, 3, H, W], normalised, scaled to fit and padded at the
    right and at the bottom; or raw `pixels` with `uint8_input`.

    Args:
        detector: mmdet's RetinaNet.
        info: what is known of it; classes and pixel statistics go into the file.
        path: the file to write; it appears whole or not at all.
        size: (height, width) in pixels, multiples of 32.
        shape: what comes out.
        opset: 18 to 23.
        uint8_input: take raw pixels.

    Raises:
        UserError: another detector, or a size that does not fit.
        BuildError: the exporter stumbled.
    """
    whole = whole_graph(detector, info, size, opset=opset, uint8_input=uint8_input)
    save_model(in_shape(whole, shape, size, info), path)


def whole_graph(
    detector: nn.Module, info: DetectorInfo, size: tuple[int, int], *, opset: int = 20,
    uint8_input: bool = False,
) -> ModelProto:  # fmt: skip
    """The graph of which all shapes are parts: levels, then decoded boxes. Args: see `export_detector`."""
    about = {
        "labels": json.dumps(list(info.classes)),
        "category_ids": json.dumps(list(info.category_ids)),
        "limits": json.dumps(asdict(limits_of(info.config))),
    }
    with scratch_folder() as scratch:
        path = scratch / "model.onnx"
        export_onnx(
            DecodedBoxes(detector, size, with_levels=True), path, info.preprocess(size), opset=opset,
            uint8_input=uint8_input, metadata=about, outputs=(*LEVEL_OUTPUTS, *BOX_OUTPUTS),
        )  # fmt: skip
        return load_model(path)


def in_shape(whole: ModelProto, shape: Shape, size: tuple[int, int], info: DetectorInfo) -> ModelProto:
    """A graph of `whole_graph` in one of the shapes."""
    model = with_outputs(whole, LEVEL_OUTPUTS if shape == "raw" else BOX_OUTPUTS)
    if shape == "decode+nms":
        model = with_suppression(model, size, limits_of(info.config))
    entry = model.metadata_props.add()
    entry.key, entry.value = "shape", shape
    return model
