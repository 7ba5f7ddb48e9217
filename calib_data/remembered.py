"""What was found out about image files, remembered from run to run.

A file is decoded and hashed once. As long as its size, times and inode stay, it is taken to be the same; every other
file is looked at again. Nothing else is remembered, so that an opening is the same whether it remembers or not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from PIL import __version__ as pillow
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
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


class KeptDocument(BaseModel):
    """What was found out, with which `reader`, and the sha256 of all that."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    reader: str = Field(default_factory=lambda: reader())
    sha256: str = ""

    def checksum(self) -> str:
        """sha256 of everything else."""
        return hashlib.sha256(to_json(self.model_copy(update={"sha256": ""}))).hexdigest()


Kept = TypeVar("Kept", bound=KeptDocument)


class _Document(KeptDocument):
    """What is known of the files of one data set, by hashes of their paths from its root."""

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
    document = recalled(_name(spec, root), _Document)
    if document is None:
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
        if is_settled(mark, opened_ns):
            seen = found[name]
            said = f"{seen.sha256} {seen.depth.whole} {seen.depth.real}" if seen else "- 0 0"
            files[_key(name)] = f"{mark} {said}"
    if files:
        keep_document(_name(spec, root), _Document(files=files))


def recalled(name: str, kind: type[Kept]) -> Kept | None:
    """The document of that name; None where there is none, where it is damaged or of another version or reader."""
    try:
        document = read_document(_place(name), kind, fix="It is made again.")
    except UserError:
        return None
    return document if document.reader == reader() and document.sha256 == document.checksum() else None


def keep_document(name: str, document: KeptDocument) -> None:
    """Keep a document under a name, where the machine has a place for it."""
    with suppress(UserError, ValueError):  # no home folder; a name that is no text
        keep(_place(name), to_json(document.model_copy(update={"sha256": document.checksum()})))


def reader() -> str:
    """What decides whether a picture can be read."""
    return f"Pillow {pillow}: {' '.join(readable_formats())}"


def is_settled(mark: Mark, opened_ns: int) -> bool:
    """Whether a file that was opened then would have another mark after its next change."""
    return mark.modified_ns < opened_ns - _UNSETTLED_NS


def _name(spec: str, root: Path) -> str:
    return f"{os.path.realpath(root)}\0{spec}"


def _place(name: str) -> Path:
    return cache_folder() / "images" / f"{_key(name)}.json"


def _key(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
