"""Predictions as they may look: long names, pictures of all shapes, networks that agree and that do not."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from upvits.deploy.predict.predictions import Guess, PicturePredictions, Prediction, Predictions, Unread

NAMES = ("Egyptian cat", "tabby, tabby cat", "lynx, catamount", "Pembroke, Pembroke Welsh corgi", "n02123045", "a" * 40)
SHAPES = ((240, 160), (160, 240), (240, 20), (20, 240), (240, 240), (64, 64))


def _thumbnail(width: int, height: int) -> str:
    colours = np.linspace((200, 40, 40), (40, 40, 200), width * height).reshape(height, width, 3)
    stream = io.BytesIO()
    Image.fromarray(colours.astype(np.uint8)).save(stream, "JPEG")
    return base64.b64encode(stream.getvalue()).decode()


def _prediction(first: int, ms: float) -> Prediction:
    shares = (96.31, 2.4, 0.9, 0.3, 0.01)
    order = [(first + step) % len(NAMES) for step in range(len(shares))]
    top = tuple(Guess(label=NAMES[at], index=at, percent=share) for at, share in zip(order, shares, strict=True))
    return Prediction(top=top, ms=ms)


def sample_predictions() -> Predictions:
    """Of two networks, for pictures of all shapes; one file could not be read."""
    pictures = tuple(
        PicturePredictions(
            path=f"photos/of/a/long/journey/IMG_2026_{'x' * 12 * number}_{number}.jpeg",
            predictions={"dense": _prediction(number, 4.21), "pruned": _prediction(number + number % 2, 1.87)},
            thumbnail=_thumbnail(*shape),
        )
        for number, shape in enumerate(SHAPES)
    )
    return Predictions(
        source="runs/vit_small_patch16_224.augreg_in21k_ft_in1k-pets",
        networks={"dense": "onnxruntime fp32", "pruned": "onnxruntime fp32"},
        median_ms={"dense": 4.21, "pruned": 1.87},
        agreement=50.0,
        pictures=pictures,
        unread=(Unread(path="photos/broken.jpg", why="It is no picture in a known format."),),
    )
