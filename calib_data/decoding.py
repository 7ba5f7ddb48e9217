"""Picture files of known formats, as 8-bit RGB the right way up."""

from __future__ import annotations

import functools
import io
import struct
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from upvits.calib_data.depth import Depth, depth_fitting
from upvits.calib_data.documents import read_regular

EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif",
    ".heic", ".heif", ".hif",
))  # fmt: skip

PICTURES = EXTENSIONS | {
    ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
    ".exr", ".hdr", ".dcm",
}  # fmt: skip
"""Names of pictures, some of which are not read: those are counted and named, so that no class loses them unnoticed."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM", "HEIF")
"""What a picture may be by its content, whatever its name says. Pillow would start another program for some others
(Ghostscript for EPS). MPO, in which phones keep two JPEGs, is among JPEG."""

LARGEST_PICTURE = 1 << 30
"""Bytes of a picture file; what Pillow decodes at most has fewer."""

_LARGE = 178_956_970
"""Pixels above which a picture is read at reduced size: Pillow refuses it otherwise."""

_REDUCED = 1 << 24
"""Pixels of a large picture, about, once it is read."""

_one_large = threading.Lock()

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
        with _opened(stream) as image:
            yield image


def _opened(stream: IO[bytes]) -> Image.Image:
    """Pillow's own way, and for very large pictures the same without its limit: `_sized` has another one."""
    try:
        return Image.open(stream, formats=readable_formats())
    except Image.DecompressionBombError:
        stream.seek(0)
        start = stream.read(16)
        stream.seek(0)
        for name in readable_formats():
            factory, accept = Image.OPEN[name]
            if accept is None or accept(start) is True:
                return factory(stream, "")
        raise


def read_picture(path: Path) -> bytes:
    """The content of a picture file.

    Raises:
        UserError: it is absent, no regular file, unreadable, or has more than a GiB.
    """
    return read_regular(path, fix="Remove it, or put a picture in its place.", largest=LARGEST_PICTURE)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The known formats that this Pillow reads: AVIF came with 11.3, HEIF comes with the package pillow-heif."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image, depth: Depth = Depth()) -> Image.Image:  # noqa: B008  # frozen
    """RGB with the EXIF orientation applied; the image itself is turned too. Transparency is dropped, as timm and
    torchvision do.

    Pictures of more than 179 million pixels come at reduced size. Those of more than 8 bits are scaled by the range of
    their set, where `depth` has one, else by the smallest of 1 (real numbers), 8, 12 and 16 bits that they fit into.

    Raises:
        ValueError: the values are of no known range, or beyond that of the set. Pillow has other errors for damaged
            pictures, all among `DECODING_ERRORS`.
    """
    image = _sized(image)
    ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies pictures that need no turning
    image = _in_eight_bits(image, depth)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def _sized(image: Image.Image) -> Image.Image:
    """The picture decoded, a very large one at reduced size and one at a time.

    Raises:
        DecompressionBombError: it would take more than a GiB.
        ValueError: its colours have 12 bits in channels of 16, of which Pillow keeps the upper 8.
    """
    deep_colour = len(image.getbands()) > 1 and ";16" in str(getattr(image, "tile", ""))
    if image.width * image.height <= _LARGE:
        image.load()
    else:
        image.draft(None, _smaller(image))  # None: in the picture's own mode
        if image.width * image.height * _bytes_of_pixel(image) > LARGEST_PICTURE:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        with _one_large:
            image.load()
            box = image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F")
            image = image.resize(_smaller(image), Image.Resampling.BOX if box else Image.Resampling.NEAREST)
    if deep_colour and max(top for _, top in image.getextrema()) < 16:  # type: ignore[misc]
        raise ValueError("colours of 12 bits in channels of 16")
    return image


def _smaller(image: Image.Image) -> tuple[int, int]:
    scale = min(1.0, (_REDUCED / (image.width * image.height)) ** 0.5)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _bytes_of_pixel(image: Image.Image) -> int:
    return 4 if image.mode in ("I", "F") else 2 if image.mode.startswith("I;16") else max(1, len(image.getbands()))


def _in_eight_bits(image: Image.Image, depth: Depth) -> Image.Image:
    """A picture of 12 or 16 bits, which Pillow would clip at 255, scaled by its range; others as they are."""
    own = _depth_of(image)
    if own == Depth():
        return image
    full = (depth.real if own.real else depth.whole) or own.real or own.whole
    if full < max(own.whole, own.real):
        raise ValueError(f"values up to {np.asarray(image).max()}, in a set whose other pictures go up to {full}")
    return Image.fromarray((np.asarray(image).astype(np.float64) * 255 / full + 1e-6).astype(np.uint8))


def _depth_of(image: Image.Image) -> Depth:
    if not image.mode.startswith("I") and image.mode != "F":
        return Depth()
    values = np.asarray(image)
    return depth_fitting(values.min().item(), values.max().item(), real=image.mode == "F")


def load_rgb(file: Path | bytes, depth: Depth = Depth()) -> Image.Image:  # noqa: B008  # frozen
    """The picture in a file, or in the bytes of one. Raises one of `DECODING_ERRORS`, or like `open_image`."""
    with open_image(file) as image:
        return to_rgb(image, depth)


def depth_in(data: bytes) -> Depth | None:
    """The range that a picture needs, nothing for 8 bits; None where it cannot be read.

    The whole picture is decoded, JPEGs at an eighth of their size, which still reads all of their data.
    """
    try:
        with open_image(data) as image:
            image.draft("RGB", (1, 1))
            return _depth_of(_sized(image))
    except DECODING_ERRORS:
        return None


def advice_on_formats(names: Iterable[str]) -> str:
    """What to do about files in formats that are not read here; nothing where all are in known ones.

    >>> advice_on_formats(["a.jxl", "b.JXL", "c.jpg"])
    'Convert the 2 files .jxl to PNG or JPEG: they are not read. '
    """
    counts = Counter(Path(name).suffix.lower() for name in names)
    here = readable_formats()
    lacking = {".avif": "AVIF" not in here} | dict.fromkeys((".heic", ".heif", ".hif"), "HEIF" not in here)
    advice = ""
    for suffix, count in sorted(counts.items()):
        files = f"the {count} files {suffix}" if count > 1 else f"the file {suffix}"
        if lacking.get(suffix):
            package = "pillow" if suffix == ".avif" else "pillow-heif"
            advice += f"To read {files}: pip install -U {package}. "
        elif suffix in PICTURES - EXTENSIONS:
            advice += f"Convert {files} to PNG or JPEG: {'they are' if count > 1 else 'it is'} not read. "
    return advice
