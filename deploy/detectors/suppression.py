"""Suppression of overlapping boxes: on the host, and as nodes of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torchvision.ops import batched_nms

from upvits.calib_data.documents import Natural, Number
from upvits.calib_data.errors import UserError

Boxes = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Limits:
    """Which boxes stay; the values are those that mmdet's detectors are tested with.

    Attributes:
        score: boxes have to be above it.
        iou: boxes that overlap a better one of their class by more than this go.
        boxes: so many stay in an image, the best first.
    """

    score: Number = 0.05
    iou: Number = 0.5
    boxes: Natural = 100


USUAL = Limits()


def limits_of(config: Mapping[str, Any]) -> Limits:
    """Limits of a detector's configuration.

    Raises:
        UserError: it asks for another kind of suppression.
    """
    test = config["test_cfg"]
    test = test.get("rcnn", test)
    nms = dict(test["nms"])
    overlap = nms.get("iou_threshold", nms.get("iou_thr"))
    if nms.get("type", "nms") != "nms" or overlap is None or test.get("min_bbox_size", 0) > 0:
        raise UserError(
            "Of model.test_cfg only score_thr, nms_pre, nms.iou_threshold and max_per_img can be changed.",
            why="Engines are judged by plain suppression of overlaps, as they will run.",
            fix="Leave the others out.",
        )
    return Limits(test["score_thr"], overlap, test["max_per_img"])


def suppress(
    boxes: Boxes,
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    limits: Limits = USUAL,
) -> tuple[Boxes, NDArray[np.float32], NDArray[np.int64]]:
    """The best boxes of one image that overlap no better one of their class.

    Args:
        boxes: [K, 4] as x1, y1, x2, y2; scores [K]; labels [K].
        limits: which boxes stay.
    """
    sure = (scores > limits.score) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # mmdet drops empty boxes
    boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
    best_first = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels), limits.iou)
    kept = best_first[: limits.boxes].numpy()
    return boxes[kept], scores[kept], labels[kept]


def with_suppression(model: onnx.ModelProto, size: tuple[int, int], limits: Limits = USUAL) -> onnx.ModelProto:
    """A graph that gives boxes, scores and labels, continued by ONNX's NonMaxSuppression.

    Boxes of different classes do not suppress each other: as in mmdet, those of each class are moved by another offset.
    Outputs are those of all images together: `boxes` [N, 4], `scores` [N], `labels` [N], and `image` [N], the index
    within the batch.

    Args:
        model: with outputs `boxes` [B, K, 4], `scores` [B, K] and `labels` [B, K].
        size: (height, width) of the images in pixels.
        limits: which boxes stay.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants: dict[str, NDArray[Any]] = {
        "nms_apart": np.array(float(max(size) + 1), np.float32),
        "nms_most": np.array(limits.boxes, np.int64),
        "nms_iou": np.array(limits.iou, np.float32),
        "nms_score": np.array(limits.score, np.float32),
        "nms_axis_1": np.array([1], np.int64),
        "nms_axis_2": np.array([2], np.int64),
        "nms_columns": np.array([0, 2], np.int64),
        "nms_first": np.array(0, np.int64),
        "nms_last": np.array([-1], np.int64),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    candidates = {"boxes": "all_boxes", "scores": "all_scores", "labels": "all_labels"}
    _rename(graph, candidates)
    graph.node.extend([
        helper.make_node("Cast", ["all_labels"], ["nms_labels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["nms_labels", "nms_apart"], ["nms_offset"]),
        helper.make_node("Unsqueeze", ["nms_offset", "nms_axis_2"], ["nms_offsets"]),
        helper.make_node("Add", ["all_boxes", "nms_offsets"], ["nms_boxes"]),
        helper.make_node("Unsqueeze", ["all_scores", "nms_axis_1"], ["nms_scores"]),
        helper.make_node(
            "NonMaxSuppression", ["nms_boxes", "nms_scores", "nms_most", "nms_iou", "nms_score"], ["nms_found"]
        ),
        helper.make_node("Gather", ["nms_found", "nms_columns"], ["nms_index"], axis=1),
        helper.make_node("Gather", ["nms_found", "nms_first"], ["image"], axis=1),
        *(helper.make_node("GatherND", [f"all_{name}", "nms_index"], [name]) for name in candidates),
    ])  # fmt: skip
    del graph.output[:]
    shapes: dict[str, tuple[int, list[str | int]]] = {
        "boxes": (TensorProto.FLOAT, ["found", 4]),
        "scores": (TensorProto.FLOAT, ["found"]),
        "labels": (TensorProto.INT64, ["found"]),
        "image": (TensorProto.INT64, ["found"]),
    }
    graph.output.extend(helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items())
    onnx.checker.check_model(result)
    return result


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors in all nodes."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
