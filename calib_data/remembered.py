"""What was found out about image files, remembered from run to run.

A file is decoded and hashed once. As long as its size, times and inode stay, it is taken to be the same; every other
file is looked at again. Nothing else is remembered, so that an opening is the same whether it remembers or not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from PIL import __version__ as pillow
from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic_core import to_json

from upvits.calib_data.cache import cache_folder, keep
from upvits.calib_data.decoding import readable_formats
from upvits.calib_data.depth import Depth
from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import UserError

_UNSETTLED_NS = 2_000_000_000
"""A file that was written so shortly ago could be written again within the same tick of its file system's clock."""

_Line = Annotated[str, StringConstraints(pattern=r"^\d{1,20}( -?\d{1,20}){2} \d{1,20} ([0-9a-f]{64}|-)( \d{1,5}){2}$")]
"""Size, time of the content and of the status in nanoseconds, inode; sha256 (`-`: it cannot be read), range."""


@dataclass(frozen=True, slots=True)
class Mark:
    """By what a file is known again; `str` writes it as in a line of the document."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    def __str__(self) -> str:
        return f"{self.size} {self.modified_ns} {self.changed_ns} {self.inode}"


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture that can be read: sha256 of its file, and the range that it needs."""

    sha256: str
    depth: Depth


class _Document(BaseModel):
    """What is known of the files of one data set, by hashes of their paths from its root."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1]
    reader: str
    files: dict[str, _Line]


def mark_of(path: str) -> Mark | None:
    """The mark of a file, links followed; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Mark(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def recall(spec: str, root: Path, marks: Mapping[str, Mark]) -> dict[str, Seen | None]:
    """What is known of files that are as they were, by path from the root; None: such a file cannot be read.

    Args:
        spec: what the data set is opened with.
        root: folder that the files lie below.
        marks: of the files in question, by path from there.
    """
    try:
        document = read_document(_place(spec, root), _Document, fix="It is made again.")
    except UserError:  # there is none, it is damaged, or of another version; or no folder for it
        return {}
    if document.reader != _reader():
        return {}
    known: dict[str, Seen | None] = {}
    for name, mark in marks.items():
        line = document.files.get(_key(name), "")
        if line.startswith(f"{mark} "):
            sha256, whole, real = line.split(" ")[4:]
            known[name] = None if sha256 == "-" else Seen(sha256, Depth(int(whole), int(real)))
    return known


def remember(
    spec: str, root: Path, marks: Mapping[str, Mark], found: Mapping[str, Seen | None], opened_ns: int
) -> None:
    """Keep what was found out, for `recall`.

    Args:
        opened_ns: when the marks were taken (`time.time_ns`).
    """
    files = {}
    for name, mark in marks.items():
        if mark.modified_ns < opened_ns - _UNSETTLED_NS:
            seen = found[name]
            said = f"{seen.sha256} {seen.depth.whole} {seen.depth.real}" if seen else "- 0 0"
            files[_key(name)] = f"{mark} {said}"
    try:
        place = _place(spec, root)
    except UserError:
        return
    keep(place, to_json(_Document(format_version=1, reader=_reader(), files=files)))


def _place(spec: str, root: Path) -> Path:
    name = f"{os.path.realpath(root)}\0{spec}"
    return cache_folder() / "images" / f"{_key(name)}.json"


def _key(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _reader() -> str:
    """What decides whether a file can be read."""
    return f"Pillow {pillow}: {' '.join(readable_formats())}"
