"""The embedded default: a drawn image set and a small model trained on it, both working offline."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from PIL import Image

from upvits.calib_data.datasets import DataSource, Images
from upvits.calib_data.drawing import CLASS_NAMES, DRAWING_VERSION, draw_labelled

DEMO_SEED = 0
DEMO_SIZE = 64
DEMO_TRAIN_IMAGES = 6_000
DEMO_VAL_IMAGES = 1_200


@functools.lru_cache(maxsize=DEMO_TRAIN_IMAGES + DEMO_VAL_IMAGES)
def _drawn(split: str, index: int) -> bytes:
    """Each picture is drawn once a process, about 2 ms each; all of them take 90 MB."""
    pixels, _ = draw_labelled(DEMO_SEED, split, index, DEMO_SIZE)
    return pixels.tobytes()


def demo_images(split: str, count: int) -> Images:
    """The first `count` pictures of "train" or "val", 64x64, drawn when they are first read."""
    labels = [index % len(CLASS_NAMES) for index in range(count)]
    return Images(labels, lambda index: Image.frombytes("RGB", (DEMO_SIZE, DEMO_SIZE), _drawn(split, index % count)))


def demo_source() -> DataSource:
    """The demo set: 12 classes, 6,000 training and 1,200 validation pictures of 64x64."""
    identity = f"drawing {DRAWING_VERSION} seed {DEMO_SEED} {DEMO_SIZE} {DEMO_TRAIN_IMAGES} {DEMO_VAL_IMAGES}"
    return DataSource(
        spec="demo",
        class_names=CLASS_NAMES,
        train=demo_images("train", DEMO_TRAIN_IMAGES),
        val=demo_images("val", DEMO_VAL_IMAGES),
        digest=hashlib.sha256(identity.encode()).hexdigest(),
    )


def demo_weights(model_name: str) -> Path | None:
    """The folder (timm's local-dir format) of the model that ships trained on the demo set; None when none does.

    Example:
        >>> demo_weights("pvt_v2_b0").name
        'pvt_v2_b0'
        >>> demo_weights("vit_huge_patch14_224") is None
        True
    """
    folder = Path(__file__).parent / "demo_weights" / model_name
    return folder if (folder / "model.safetensors").is_file() else None
