"""The compiled operators of mmcv that RetinaNet and Mask R-CNN need, in torch and torchvision.

`mmcv-lite` comes without mmcv's compiled extension, which most of mmdet imports. This module has the signatures of that
extension (mmcv 2.1, `mmcv/ops/csrc`); results are the same up to rounding. Every other operator says what to install
when it is called.
"""

from __future__ import annotations

import importlib.machinery
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms
from torchvision.ops import roi_align as torchvision_roi_align

from upvits.calib_data.errors import MissingDependencyError


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes [N, 4] that stay, best first; widths are x2 - x1 + offset."""
    kept: Tensor = torchvision_nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)
    return kept


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al., arXiv 1708.02002, eq. 5) of every logit [N, C], into `output`.

    Args:
        target: class of each row [N]; C is background.
        weight: of each class [C], or empty.
    """
    positive = _one_hot(logits, target)
    p = logits.sigmoid()
    log_p, log_q = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    loss = -torch.where(positive, alpha * (1 - p) ** gamma * log_p, (1 - alpha) * p**gamma * log_q)
    output.copy_(loss * _of_rows(weight, target, logits))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, gradient: Tensor, *, gamma: float, alpha: float
) -> None:
    """Its derivative by the logits, into `gradient`."""
    positive = _one_hot(logits, target)
    p = logits.sigmoid()
    log_p, log_q = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    rises = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p)
    falls = -(1 - alpha) * p**gamma * (gamma * (1 - p) * log_q - p)
    gradient.copy_(torch.where(positive, rises, falls) * _of_rows(weight, target, logits))


def roi_align_forward(
    features: Tensor, rois: Tensor, output: Tensor, *_: Tensor, aligned_height: int, aligned_width: int,
    spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """RoIAlign (He et al., arXiv 1703.06870, section 3) of rois [K, 5] (image, x1, y1, x2, y2), into `output`.

    mmdet crops masks with it, which needs no gradient; for features it is told to use torchvision itself.
    """
    if pool_mode != 1:
        raise MissingDependencyError(
            "RoIAlign by maximum needs mmcv's compiled operators.", fix="Use pool_mode='avg', or a full build of mmcv."
        )
    size = (aligned_height, aligned_width)
    output.copy_(torchvision_roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned))


def _one_hot(logits: Tensor, target: Tensor) -> Tensor:
    return target.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)


def _of_rows(weight: Tensor, target: Tensor, logits: Tensor) -> Tensor:
    """Weight of every row [N, 1]; background counts 1."""
    if not weight.numel():
        return logits.new_ones(1, 1)
    return torch.cat([weight, weight.new_ones(1)])[target].unsqueeze(1)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
    "roi_align_forward": roi_align_forward,
}


def stand_in() -> types.ModuleType:
    """A module to put in place of `mmcv._ext`."""
    module = types.ModuleType("mmcv._ext", "Operators in torch and torchvision, and errors for all others.")
    module.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)  # mmengine looks for it
    module.__dict__.update(_OPERATORS)
    module.__getattr__ = _absent  # type: ignore[method-assign]
    return module


def _absent(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise MissingDependencyError(
            f"This detector needs mmcv's compiled operator {name}.",
            why="mmcv-lite has no compiled operators; those of RetinaNet and Mask R-CNN are replaced, others are not.",
            fix="Install a full build of mmcv for your torch and CUDA in place of mmcv-lite; it is then used.",
        )

    return refuse
