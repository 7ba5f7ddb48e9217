"""A RetinaNet as a graph of tensors: from images to the levels of its head, or to a fixed number of decoded boxes.

mmdet decodes image by image with masks of changing length, which neither exports nor batches. Here the same is done
with top-k and gather alone, for any batch and one image size: candidates are the best (anchor, class) pairs of every
level by score, as in mmdet's `filter_scores_and_topk`. Boxes below the score threshold are removed later, together with
overlapping ones; the order makes no difference, since top-k and threshold commute.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError

MAX_LOG_RATIO = abs(math.log(16 / 1000))
"""Predicted widths and heights stay within this factor of their anchor's (mmdet's `wh_ratio_clip`)."""


class Levels(nn.Module):
    """Images [B, 3, H, W] (normalised) to class logits [B, A * C, h, w] and deltas [B, A * 4, h, w] of every level.

    Args:
        detector: mmdet's RetinaNet, in eval mode.

    Raises:
        UserError: it is another detector.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        if type(detector).__name__ != "RetinaNet":
            raise UserError(
                f"A {type(detector).__name__} cannot be exported.",
                why="Its boxes depend on each other in ways that have no fixed graph.",
                fix='Train a RetinaNet (`detector="retinanet"`).',
            )
        self.backbone = detector.get_submodule("backbone")
        self.neck = detector.get_submodule("neck")
        self.bbox_head: Any = detector.get_submodule("bbox_head")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of all levels, finest first, then deltas of all levels."""
        logits, deltas = self.bbox_head(self.neck(self.backbone(images)))
        return (*logits, *deltas)


class DecodedBoxes(nn.Module):
    """Images [B, 3, H, W] to boxes [B, K, 4] (x1, y1, x2, y2 in pixels), scores [B, K] and labels [B, K] (int64).

    K is all candidates, level by level: up to 1,000 of each (`nms_pre`), as many as mmdet looks at, so that suppression
    keeps the same boxes in crowded images.

    Args:
        detector: mmdet's RetinaNet, in eval mode.
        size: (height, width) of the images, multiples of 32.
        with_levels: give what `Levels` gives first.

    Raises:
        UserError: the size does not fit, or the detector has no `nms_pre`.
    """

    def __init__(self, detector: nn.Module, size: tuple[int, int], *, with_levels: bool = False) -> None:
        super().__init__()
        if size[0] % 32 or size[1] % 32:
            raise UserError(f"Images of {size[0]} x {size[1]} pixels do not fit.", fix="Give multiples of 32.")
        self.levels = Levels(detector)
        self.size, self.with_levels = size, with_levels
        head = self.levels.bbox_head
        if "nms_pre" not in head.test_cfg:
            raise UserError(
                "The detector does not say how many boxes of a level count (test_cfg.nms_pre).",
                fix="Use a detector's folder as it was written.",
            )
        self.num_classes, self.candidates = int(head.cls_out_channels), int(head.test_cfg["nms_pre"])
        with torch.no_grad():
            example = torch.zeros(1, 3, *size, device=next(detector.parameters()).device)
            shapes = [level.shape[-2:] for level in self.levels(example)]
        anchors = head.prior_generator.grid_priors(shapes[: len(shapes) // 2], device=example.device)
        for index, level in enumerate(anchors):
            self.register_buffer(f"anchors_{index}", level.float())
        coder = head.bbox_coder
        self.register_buffer("means", torch.tensor(coder.means, device=example.device).float())
        self.register_buffer("stds", torch.tensor(coder.stds, device=example.device).float())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Boxes, scores and labels; boxes that overlap are all still among them."""
        maps = self.levels(images)
        count = len(maps) // 2
        parts = [self._level(i, maps[i], maps[count + i]) for i in range(count)]
        boxes, scores, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        # boxes that were clipped to nothing are dropped by mmdet; here their score becomes 0
        extents = boxes[..., 2:] - boxes[..., :2]
        scores = scores * (extents.amin(dim=-1) > 0)
        return (*maps, boxes, scores, labels) if self.with_levels else (boxes, scores, labels)

    def _level(self, index: int, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        anchors = cast(Tensor, getattr(self, f"anchors_{index}"))
        scores = logits.permute(0, 2, 3, 1).flatten(1).sigmoid()  # [B, anchors * classes]
        best, pairs = scores.topk(min(self.candidates, len(anchors) * self.num_classes), dim=1)
        which = pairs // self.num_classes
        all_deltas = deltas.permute(0, 2, 3, 1).flatten(1, 2).reshape(-1, len(anchors), 4)  # any batch
        chosen = all_deltas.gather(1, which.unsqueeze(-1).expand(-1, -1, 4))
        return self._boxes(anchors[which], chosen), best, pairs % self.num_classes

    def _boxes(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """Anchors [B, K, 4] moved and scaled by deltas [B, K, 4] (R-CNN's parametrisation), clipped to the image."""
        deltas = deltas * cast(Tensor, self.stds) + cast(Tensor, self.means)
        extent = anchors[..., 2:] - anchors[..., :2]
        centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * extent
        half = extent * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
        height, width = self.size
        corners = torch.cat([centre - half, centre + half], dim=-1)
        return corners.clamp(min=0).minimum(corners.new_tensor([width, height, width, height]))
