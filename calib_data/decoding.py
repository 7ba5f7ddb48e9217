"""Any picture file that Pillow can read, as 8-bit RGB the right way up."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)

# What Pillow raises for damaged files; a decompression bomb is no picture that anybody would train on.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with the EXIF orientation applied. Transparency is dropped, as timm and torchvision do."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
        sixteen = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(sixteen // 257, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def load_rgb(file: Path | bytes) -> Image.Image:
    """The picture in a file, or in the bytes of one. Raises one of `DECODING_ERRORS`."""
    data = file if isinstance(file, bytes) else file.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of broken EXIF blocks, which do not matter here
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)


def is_readable(data: bytes) -> bool:
    """Whether the whole picture decodes; JPEGs at an eighth of their size, which still reads all of their data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (1, 1))
                image.load()
        return True
    except DECODING_ERRORS:
        return False
