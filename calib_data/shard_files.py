"""Shards as files, on this machine or wherever fsspec reads from: where they are, and how samples are read by place.

Reading is by place, so that any order can be had again; whoever asks in the order of shards reads them as streams. A
local shard stays open. Of a remote one single samples are fetched as ranges; once several are wanted, the whole shard
comes in one go, into a scratch folder that all workers share and that holds the last few.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from filelock import FileLock

from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.printable import printable
from upvits.calib_data.remembered import mark_of
from upvits.calib_data.scratch import scratch_folder

_MOST_SHARDS = 100_000
_OPEN = 16
"""Files that a process keeps open."""

_RANGES = 4
"""So many samples of a remote shard come one by one; with the next one it is fetched whole."""

_BLOCK = 8 << 20
"""Bytes of a request while a remote shard is looked through."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file.

    Attributes:
        place: its path, or its URL.
        name: from the root of the data set, with `/`.
    """

    place: str
    name: str

    @property
    def is_remote(self) -> bool:
        """Whether fsspec reads it."""
        return is_url(self.place)

    def mark(self) -> str:
        """By what it is known again; another content gives another mark."""
        if self.is_remote:
            return f"{_size(self.place)} {_ask(self.place, 'ukey')}"
        return str(mark_of(self.place))

    def size(self) -> int:
        """Bytes.

        Raises:
            UserError: there is no such file, or it is no regular one.
        """
        if self.is_remote:
            return _size(self.place)
        return require_regular(Path(self.place), fix="Give tar files, or remove this one.").st_size

    def open(self) -> IO[bytes]:
        """The file, to be read from front to back."""
        if self.is_remote:
            opened: IO[bytes] = _ask(self.place, "open", "rb", block_size=_BLOCK)
            return opened
        return Path(self.place).open("rb")

    def __str__(self) -> str:
        return printable(self.place, 300)


def is_url(place: str) -> bool:
    """Whether a place is no path of this machine.

    >>> [is_url(place) for place in ("s3://bucket/a.tar", "/data/a.tar", "C:/a.tar")]
    [True, False, False]
    """
    return "://" in place


def expanded(pattern: str) -> list[str]:
    """The places that braces stand for, as in the WebDataset library.

    Raises:
        UserError: a brace is not closed, a range is empty, or there are too many.

    >>> expanded("s3://b/{train,val}-{008..010}.tar")[:4]
    ['s3://b/train-008.tar', 's3://b/train-009.tar', 's3://b/train-010.tar', 's3://b/val-008.tar']
    """
    found = [""]
    for text, inner in re.findall(r"([^{}]*)(?:\{([^{}]*)\})?", pattern):
        choices = _choices(inner, pattern) if inner else [""]
        found = [start + text + choice for start in found for choice in choices]
        if len(found) > _MOST_SHARDS:
            raise _wrong_pattern(pattern, f"It stands for more than {_MOST_SHARDS:,} shards.")
    if pattern.count("{") != pattern.count("}") or re.search(r"\{[^{}]*\{|\}[^{}]*\}|\{\}|^[^{]*\}", pattern):
        raise _wrong_pattern(pattern, "Its braces are empty, not closed, or within each other.")
    return found


def _choices(inner: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inner)
    if numbers is None:
        if ".." in inner or "," not in inner:
            raise _wrong_pattern(pattern, f"{{{inner}}} is neither a range of numbers nor a list.")
        return inner.split(",")
    first, last = (int(number) for number in numbers.groups())
    if not first <= last < first + _MOST_SHARDS:
        raise _wrong_pattern(pattern, f"{{{inner}}} has no shards, or too many.")
    return [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]


def _wrong_pattern(pattern: str, why: str) -> UserError:
    return UserError(
        f"{printable(pattern, 200)} is no pattern of shards.",
        why=why,
        fix="Write a range as {000..146}, and names as {train,val}.",
    )


def listed_in(root: str) -> list[Shard]:
    """The tar files below a folder, or those that a pattern or a single tar file names, in order."""
    if root.endswith(".tar") or "{" in root:
        places = expanded(root)
        folders = [place.split("/")[:-1] for place in places]
        same = next((at for at, parts in enumerate(zip(*folders, strict=False)) if len({*parts}) > 1), None)
        start = min(map(len, folders)) if same is None else same
        return [Shard(place, "/".join(place.split("/")[start:])) for place in places]
    if is_url(root):
        scheme = root.partition("://")[0]
        inside = _path_of(root)
        paths = sorted(path for path in _ask(root, "find") if path.endswith(".tar"))
        return [Shard(f"{scheme}://{path}", path.removeprefix(inside).lstrip("/")) for path in paths]
    return [Shard(str(path), path.relative_to(root).as_posix()) for path in sorted(Path(root).rglob("*.tar"))]


def _path_of(url: str) -> str:
    return str(_connected(url)[1])


def read_text_at(root: str, name: str) -> bytes | None:
    """A small file below a remote folder; None where there is none."""
    place = f"{root.rstrip('/')}/{name}"
    if not _ask(place, "exists"):
        return None
    return bytes(_ask(place, "cat_file"))


def _connected(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path there. fsspec keeps one for each process."""
    known = ", ".join(f"{name}://" for name in ("s3", "gs", "hf", "https", "file"))
    fix = f"Give a folder, or a URL that fsspec reads: {known}, ..."
    if "::" in url or url.startswith("reference:"):  # would follow what stands in other files
        raise UserError(f"{printable(url, 200)} is no place of shards.", why="URLs within URLs are not read.", fix=fix)
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingDependencyError(
            f"{printable(url, 200)} cannot be read here.", why=f"{error}.", fix="Install it, or copy the shards here."
        ) from error
    except Exception as error:  # of any kind: a file system may connect at once
        raise UserError(
            f"{printable(url, 200)} is no place of shards.", why=f"{printable(_said(error), 200)}.", fix=fix
        ) from error
    return found


def _said(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _ask(url: str, method: str, *arguments: Any, **named: Any) -> Any:
    """What the file system of a URL says. Networks fail in the ways of many libraries.

    Raises:
        UserError: names the URL.
    """
    system, path = _connected(url)
    try:
        return getattr(system, method)(path, *arguments, **named)
    except Exception as error:
        raise UserError(
            f"{printable(url, 300)} cannot be read.",
            why=f"{printable(_said(error), 200)}.",
            fix="Check the address, the network, your credentials and the room on the disk, and give the same "
            "command again.",
        ) from error


def _size(url: str) -> int:
    return int(_ask(url, "info")["size"])


class ShardReader:
    """Reads samples by shard and place. Workers may have copies of it: what is fetched, they share."""

    def __init__(self, places: Sequence[str], most_kept: int) -> None:
        """Nothing is read.

        Args:
            places: paths and URLs of the shards.
            most_kept: so many fetched shards are kept.
        """
        self._places, self._most_kept = places, max(most_kept, 2)
        self._scratch = ""
        if any(map(is_url, places)):
            self._scratch = tempfile.mkdtemp(prefix="upvits-shards-", dir=scratch_folder())
            weakref.finalize(self, _remove, self._scratch, os.getpid())
        self._wanted: Counter[int] = Counter()
        self._open: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close, self._open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The bytes of a file in a shard; fewer where the shard has become shorter.

        Raises:
            UserError: a remote shard cannot be read.
            OSError: a local one cannot.
        """
        place = self._places[shard]
        if is_url(place) and shard not in self._open:
            self._wanted[shard] += 1
            if self._wanted[shard] <= _RANGES:
                return bytes(_ask(place, "cat_file", start=offset, end=offset + size))
        return os.pread(self._opened(shard), size, offset)

    def _opened(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _OPEN:
            os.close(self._open.popitem(last=False)[1])
        place = self._places[shard]
        self._open[shard] = self._fetched(shard, place) if is_url(place) else os.open(place, os.O_RDONLY)
        return self._open[shard]

    def _fetched(self, shard: int, place: str) -> int:
        """A remote shard in the scratch folder, open. Whoever comes first fetches it, and the oldest ones leave."""
        folder = Path(self._scratch)
        copy = folder / f"{shard}.tar"
        with FileLock(folder / f"{shard}.lock"):
            if not copy.exists():
                _ask(place, "get_file", str(folder / f"{shard}.part"))
                os.replace(folder / f"{shard}.part", copy)
            os.utime(copy)
            descriptor = os.open(copy, os.O_RDONLY)
        with suppress(OSError):  # another process may be at it
            for old in sorted(folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)[: -self._most_kept]:
                old.unlink()
        return descriptor


def _remove(folder: str, process: int) -> None:
    """Workers have copies of a reader, and the folder is not theirs."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _close(opened: OrderedDict[int, int]) -> None:
    for descriptor in opened.values():
        with suppress(OSError):
            os.close(descriptor)
