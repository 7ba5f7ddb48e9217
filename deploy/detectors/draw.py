"""Pictures of the boxes that detectors find, beside the annotated ones."""

from __future__ import annotations

import base64
import colorsys
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from upvits.calib_data.decoding import open_image
from upvits.deploy.report.detection import Picture
from upvits.detection.coco import CocoData, read_annotations

SHOWN_SCORE = 0.3
"""Boxes below it are not drawn."""

_PANEL = 320  # longest side of one picture in pixels


def pictures(data: CocoData, detections: Mapping[str, Sequence[Mapping[str, Any]]], count: int = 6) -> list[Picture]:
    """Some validation images, each as panels side by side: the annotated boxes, then those of every detector.

    Args:
        data: whose validation images are drawn, evenly spread.
        detections: in COCO's result format, by name of the detector.
        count: images.
    """
    document = read_annotations(data.val.annotations)
    names = dict(zip(data.category_ids, data.classes, strict=True))
    truth = _by_image(box.model_dump() for box in document.annotations if not box.iscrowd)
    shown = [
        _by_image(box for box in boxes if box["score"] >= SHOWN_SCORE and box["category_id"] in names)
        for boxes in detections.values()
    ]
    with_boxes = [image for image in document.images if truth[image.id]]
    count = min(count, len(with_boxes))
    made = []
    for image in (with_boxes[index * len(with_boxes) // count] for index in range(count)):
        with open_image(data.val.images / image.file_name) as opened:
            original = opened.convert("RGB")
        panels = [_drawn(original, boxes[image.id], names) for boxes in (truth, *shown)]
        title = f"{image.file_name}: annotated, {', '.join(detections)}"
        made.append(Picture(title=title, data=_uri(_side_by_side(panels))))
    return made


def _by_image(boxes: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    grouped: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for box in boxes:
        grouped[box["image_id"]].append(box)
    return grouped


def _drawn(image: Image.Image, boxes: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Image.Image:
    scale = _PANEL / max(image.size)
    panel = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    pen = ImageDraw.Draw(panel)
    order = sorted(names)
    for box in sorted(boxes, key=lambda box: box.get("score", 1.0)):  # the highest score on top
        x, y, width, height = (scale * value for value in box["bbox"])
        colour = _colour(order.index(box["category_id"]), len(order))
        pen.rectangle((x, y, x + width, y + height), outline=colour, width=2)
        text = names[box["category_id"]] + (f" {box['score']:.2f}" if "score" in box else "")
        place = (min(max(0, x), panel.width - 12), max(0, y - 11))
        pen.rectangle(pen.textbbox(place, text), fill=colour)
        pen.text(place, text, fill="white")
    return panel


def _colour(index: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index / count, 0.9, 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    gap = 4
    whole = Image.new("RGB", (sum(p.width for p in panels) + gap * (len(panels) - 1), panels[0].height), "white")
    left = 0
    for panel in panels:
        whole.paste(panel, (left, 0))
        left += panel.width + gap
    return whole


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
