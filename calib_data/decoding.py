"""Picture files of known formats, as 8-bit RGB the right way up."""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from upvits.calib_data.documents import read_regular

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
"""What a picture may be by its content, whatever its name says. Pillow would start another program for some others
(Ghostscript for EPS). MPO, in which phones keep two JPEGs, is among JPEG."""

LARGEST_PICTURE = 1 << 30
"""Bytes of a picture file; what Pillow decodes at most has fewer."""

# What Pillow raises for damaged files; a decompression bomb is no picture that anybody would train on.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@contextmanager
def open_image(file: Path | bytes | IO[bytes]) -> Iterator[Image.Image]:
    """A picture as Pillow opens it, yet to be decoded.

    Args:
        file: a path, the content of a file, or a file that can be sought in.

    Raises:
        UserError: the path is no regular file, or one of more than a GiB.
        OSError: the content is no picture in one of the known formats. Pillow has other errors for damaged ones, all
            among `DECODING_ERRORS`.
    """
    if isinstance(file, Path):
        file = read_picture(file)
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of broken EXIF blocks, which do not matter here
        with Image.open(stream, formats=_formats()) as image:
            yield image


def read_picture(path: Path) -> bytes:
    """The content of a picture file.

    Raises:
        UserError: it is absent, no regular file, unreadable, or has more than a GiB.
    """
    return read_regular(path, fix="Remove it, or put a picture in its place.", largest=LARGEST_PICTURE)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The known formats that this Pillow was built with: AVIF came with 11.3, and others may be left out."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


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
    """The picture in a file, or in the bytes of one. Raises one of `DECODING_ERRORS`, or like `open_image`."""
    with open_image(file) as image:
        return to_rgb(image)


def is_readable(data: bytes) -> bool:
    """Whether the whole picture decodes; JPEGs at an eighth of their size, which still reads all of their data."""
    try:
        with open_image(data) as image:
            image.draft("RGB", (1, 1))
            image.load()
        return True
    except DECODING_ERRORS:
        return False
