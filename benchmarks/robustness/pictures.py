"""Pictures, folders of them, and shards: damaged, lying about their size, of other kinds, with hostile names."""

from __future__ import annotations

import functools
import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.robustness.case import CHEAP, CUT, NAMES, SIDE, Arguments, Case, Ground
from benchmarks.robustness.mutations import TEXTS, is_file_name, mutated, no_documents, shown, written

_READ = ("score", *CUT, "--weights", "random", "--image-size", str(SIDE), *CHEAP)
"""Reads every training image."""


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """Each kind of file as all pictures of a data set, then among good ones; then names and links."""
    good = saved("PNG")
    files = {**_of_many_kinds(), **_lying(), **_damaged(random)}
    for what, raw in files.items():
        arrange = functools.partial(_all_of_one, raw)
        yield Case(f"pictures: {what}", arrange, environment={"PATH": f"{ground.case}/bin:{os.environ['PATH']}"})
        yield Case(f"a picture: {what}", functools.partial(_one_of_many, ground, raw))
    names: list[str | bytes] = [text for text in TEXTS if is_file_name(text)]
    for name in (*random.sample(names, 14), b"bad\xff", "\u00fcn\u00ef"):
        yield Case(f"class folder {shown(name)}", functools.partial(_named, name, good))
    for what, change in _LINKS.items():
        yield Case(f"image folder: {what}", functools.partial(_linked, ground, change))


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """A picture of noise as a file."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def _of_array(array: Any, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def _of_many_kinds() -> dict[str, bytes]:
    made = {f"PNG, {mode}": saved("PNG", mode) for mode in ("L", "LA", "1", "P", "RGBA")}
    made |= {f"JPEG, {mode}": saved("JPEG", mode) for mode in ("CMYK", "L", "YCbCr")}
    made |= {
        kind: saved(kind)
        for kind in ("WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "PCX", "SGI", "IM", "PDF")
    }
    made["EPS"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"
    made["GIF, moving"] = saved("GIF", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))] * 5)
    made["PNG of 16 bits"] = _of_array(np.full((SIDE, SIDE), 60_000, np.uint16), "PNG")
    made["TIFF of NaN"] = _of_array(np.full((SIDE, SIDE), np.nan, np.float32), "TIFF")
    made["TIFF of -5"] = _of_array(np.full((SIDE, SIDE), -5, np.int32), "TIFF")
    made["TIFF, LAB"] = saved("TIFF", "LAB")
    made |= {
        "SVG": b"<svg/>",
        "HTML": b"<html>",
        "text": b"hello",
        "nothing": b"",
        "PSD": b"8BPS" + bytes(100),
        "FITS": b"SIMPLE  =                    T" + b" " * 3000,
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    }
    return made


def _png(width: int, height: int, *, bits: int = 8, rows: int | None = None, more: bytes = b"") -> bytes:
    """A black PNG; `rows` fewer than `height` are a lie in its header."""
    packer, line = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + more + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _lying() -> dict[str, bytes]:
    bomb = b"a\0\0" + zlib.compress(bytes(200_000_000), 9)
    made = {
        "60,000 by 60,000 pixels": _png(60_000, 60_000, bits=1, rows=100),
        "12,000 by 12,000 pixels": _png(12_000, 12_000),
        "fewer rows than it says": _png(5000, 5000, rows=3),
        "0 by 0 pixels": _png(0, 0),
        "1 by 1 pixel": _png(1, 1),
        "1 by 20,000 pixels": _png(1, 20_000),
        "20,000 by 1 pixels": _png(20_000, 1),
        "bomb in a text": _png(64, 64, more=_chunk(b"zTXt", bomb)),
        "bomb in a profile": _png(64, 64, more=_chunk(b"iCCP", bomb)),
        "PPM of 10**10 pixels": b"P6 99999 99999 255\n123",
        "PPM of 10**20 pixels": b"P6 9999999999 9999999999 255\n123",
        "GIF of 65,535 by 65,535": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(20),
        "BMP of random bytes": b"BM" + Random(0).randbytes(60),
        "TIFF of 2**62 pixels": _tiff({256: 2**31, 257: 2**31, 258: 8}),
    }
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{"8" * 30}"/>')
    made["XMP that turns it by 8888..."] = saved("PNG", pnginfo=notes)
    exif = {
        "in a circle": _tiff({0x8769: 8}),
        "with 2**32 values": b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x0112, 3, 0xFFFFFFFF, 8),
        "that is random": Random(0).randbytes(500),
        "that turns it by 99": _tiff({0x0112: 99}),
        "that turns it": _tiff({0x0112: 6}),
        "with text where a number is": b"MM\0*\0\0\0\x08\0\x01"
        + struct.pack(">HHI", 0x0112, 2, 3)
        + b"AB\0\0"
        + bytes(4),
        "with a fraction": b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x0112, 5, 1, 8) + bytes(4),
        "of 60 kB": _tiff({0x9286: 1}) + b"A" * 60_000,
    }
    jpeg = saved("JPEG")
    for what, raw in exif.items():
        made[f"EXIF {what}"] = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(raw) + 8) + b"Exif\0\0" + raw + jpeg[2:]
    return made


def _tiff(entries: dict[int, int]) -> bytes:
    """A TIFF, or an EXIF block, of whole numbers."""
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + listed + bytes(4)


def _damaged(random: Random) -> dict[str, bytes]:
    made = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        whole = saved(kind)
        made[f"{kind} cut in half"] = whole[: len(whole) // 2]
        for _ in range(3):
            at = random.randrange(len(whole))
            made[f"{kind}, other bytes at {at}"] = whole[:at] + random.randbytes(8) + whole[at + 8 :]
    return made


def _all_of_one(raw: bytes, here: Path) -> Arguments:
    """Nothing but this file; a Ghostscript lies in wait on the PATH."""
    (here / "bin").mkdir()
    (here / "bin/gs").write_text(f"#!/bin/sh\ntouch {here}/MARKER\n")
    (here / "bin/gs").chmod(0o755)
    for name in NAMES:
        (here / "d" / name).mkdir(parents=True)
        for index in range(2):
            (here / "d" / name / f"{index}.jpg").write_bytes(raw)
    return [*_READ, "--data", f"imagefolder:{here / 'd'}", "-o", here / "run", "--quiet"]


def _copy(ground: Ground, here: Path) -> Path:
    """The good data set, to add to; of links, which are quicker."""
    for path in ground.photos.rglob("*.png"):
        place = here / "d" / path.relative_to(ground.photos)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, place)
    return here / "d"


def _one_of_many(ground: Ground, raw: bytes, here: Path) -> Arguments:
    folder = _copy(ground, here)
    (folder / "train" / NAMES[0] / "x.jpg").write_bytes(raw)
    return [*_READ, "--proxy-images", "40", "--data", f"imagefolder:{folder}", "-o", here / "run", "--quiet"]


def _named(name: str | bytes, good: bytes, here: Path) -> Arguments:
    for folder in (
        os.fsencode(here) + b"/d/" + (name if isinstance(name, bytes) else name.encode()),
        os.fsencode(here) + b"/d/zz",
    ):
        os.makedirs(folder)
        for index in range(3):
            with open(folder + b"/%d.png" % index, "wb") as file:
                file.write(good)
    return [*_READ, "--data", f"imagefolder:{here / 'd'}", "-o", here / "run"]


def _linked(ground: Ground, change: Callable[[Path], object], here: Path) -> Arguments:
    folder = _copy(ground, here)
    change(folder / "train" / NAMES[0])
    return [*_READ, "--data", f"imagefolder:{folder}", "-o", here / "run", "--quiet"]


_LINKS: dict[str, Callable[[Path], object]] = {
    "a pipe as picture": lambda folder: os.mkfifo(folder / "x.jpg"),
    "/dev/zero as picture": lambda folder: (folder / "x.jpg").symlink_to("/dev/zero"),
    "a link to nothing": lambda folder: (folder / "x.jpg").symlink_to("/nonexistent"),
    "a link in a circle": lambda folder: (folder / "x.jpg").symlink_to("x.jpg"),
    "a folder called x.jpg": lambda folder: (folder / "x.jpg").mkdir(),
    "a class in itself": lambda folder: (folder / "self").symlink_to(folder),
    "the root as class": lambda folder: folder.with_name("root").symlink_to("/"),
    "a link to nothing as class": lambda folder: folder.with_name("c").symlink_to("/nonexistent"),
    "a class in a circle": lambda folder: folder.with_name("c").symlink_to("c"),
    "a pipe as class": lambda folder: os.mkfifo(folder.with_name("c")),
    "a picture of 5 GiB": lambda folder: os.truncate(_touched(folder / "x.jpg"), 5 << 30),
    "nothing in a class": lambda folder: folder.with_name("empty").mkdir(),
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


Member = tuple[str, bytes, dict[str, Any]]


def shards(ground: Ground, random: Random) -> Iterator[Case]:
    """WebDataset shards whose members, labels, headers and `_info.json` lie."""
    good = saved("PNG")
    yield Case("shards: good ones", functools.partial(_wds, sample_members(good), None), "done")
    prefixes = (
        "../../../precious/",
        f"{ground.precious}/",
        "\x1b[31m",
        "a/../b/",
        "x" * 300,
        "\u202e",
        "$(touch MARKER)",
    )
    for prefix in prefixes:
        yield Case(
            f"shards: names after {shown(prefix)}", functools.partial(_wds, sample_members(good, prefix=prefix), None)
        )
    labels = (
        "-5",
        "-1",
        "2",
        "100000000",
        "1000000000",
        "9" * 12,
        "9" * 5000,
        "",
        "a",
        "1.5",
        "\xff",
        " 1 ",
        "1_0",
        "\u00b2",
        "nan",
        "1e3",
        "0x1",
        "\0",
        "1\n2",
    )
    for label in labels:
        yield Case(
            f"shards: label {shown(label)}", functools.partial(_wds, sample_members(good, ("0", "1", "0", label)), None)
        )
    kinds: dict[str, dict[str, Any]] = {
        "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        "link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "hard link": {"type": tarfile.LNKTYPE, "linkname": "../../precious/notes.txt"},
        "pipe": {"type": tarfile.FIFOTYPE},
        "size of 10**6 more": {"size": len(good) + 10**6},
        "size of 2**50": {"size": 2**50},
        "size of 0": {"size": 0},
        "size below 0 in a header": {"pax_headers": {"size": "-5"}},
    }
    for what, header in kinds.items():
        more: Sequence[Member] = [("z.png", good, header), ("z.cls", b"0", {})]
        yield Case(f"shards: a member with {what}", functools.partial(_wds, [*sample_members(good), *more], None))
    only: dict[str, list[Member]] = {
        "no members": [],
        "only pictures": [("a.png", good, {})],
        "only labels": [("a.cls", b"0", {})],
    }
    for what, members in only.items():
        yield Case(f"shards: {what}", functools.partial(_wds, members, None))
    for what, raw in {
        "gzip": gzip.compress(tar(sample_members(good))),
        "half": tar(sample_members(good))[:3000],
        **no_documents(b"{}"),
    }.items():
        yield Case(f"shards: {what}", functools.partial(_wds, raw, None))
    splits = {"train": {"filenames": ["train.tar"]}, "validation": {"filenames": ["val.tar"]}}
    info = {"splits": splits, "class_names": ["a", "b"]}
    for _ in range(45):
        what, changed = mutated(info, random)
        yield Case(f"_info.json: {what}", functools.partial(_wds, sample_members(good), written(changed)))
    for what, raw in no_documents(written(info)).items():
        yield Case(f"_info.json: {what}", functools.partial(_wds, sample_members(good), raw))


def sample_members(good: bytes, labels: Sequence[str] = ("0", "1", "0", "1"), prefix: str = "") -> list[Member]:
    """The files of a shard: pictures and their labels."""
    made: list[Member] = []
    for index, label in enumerate(labels):
        made += [(f"{prefix}{index}.png", good, {}), (f"{prefix}{index}.cls", label.encode(), {})]
    return made


def tar(members: Sequence[Member]) -> bytes:
    """An archive, header by header: they may lie."""
    raw = b""
    for name, data, header in members:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        for key, value in header.items():
            setattr(entry, key, value)
        raw += entry.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
    return raw + bytes(1024)


def _wds(members: Sequence[Member] | bytes, info: bytes | None, here: Path) -> Arguments:
    (here / "d").mkdir()
    for split in ("train", "val"):
        (here / "d" / f"{split}.tar").write_bytes(members if isinstance(members, bytes) else tar(members))
    if info is not None:
        (here / "d/_info.json").write_bytes(info)
    return [*_READ, "--data", f"wds:{here / 'd'}", "-o", here / "run", "--quiet"]
