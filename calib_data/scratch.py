"""Tensors that would take too much memory, on disk for as long as they are needed."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upvits.calib_data.errors import UserError

_LARGE_FILES = Path("/var/tmp")
"""Where systems want large temporary files: what lies in /tmp may take memory."""


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    room: int
    shape: torch.Size
    dtype: torch.dtype


class Scratch:
    """Tensors by name, in a file without a name: it is gone with this process, however that ends.

    Tensors are copied on the way in and out, so that the file takes no memory but what the system has to spare. The
    file lies where `TMPDIR` says, or else in /var/tmp.

    Example:
        >>> kept = Scratch()
        >>> kept["a"] = torch.ones(2)
        >>> kept["a"]
        tensor([1., 1.])
    """

    def __init__(self) -> None:
        with tempfile.TemporaryFile(dir=scratch_folder()) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._places: dict[Hashable, _Place] = {}
        self._end = 0

    def __contains__(self, name: Hashable) -> bool:
        return name in self._places

    def __setitem__(self, name: Hashable, tensor: Tensor) -> None:
        """Keep a tensor of any device, in place of what had this name.

        Raises:
            UserError: the disk is full.
        """
        whole = tensor.detach().cpu().contiguous()
        left, before = _bytes_of(whole), self._places.get(name)
        if before is None or before.room < len(left):
            before = _Place(self._end, len(left), whole.shape, whole.dtype)
            self._end += len(left)
        self._places[name] = replace(before, shape=whole.shape, dtype=whole.dtype)
        at = before.offset
        try:
            while left:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"There is no room left in {scratch_folder()}.",
                why="Images and what networks make of them are kept there while it is worked on them.",
                fix="Make room, take fewer images, or let the environment variable TMPDIR name a folder on another "
                "disk.",
            ) from error

    def __getitem__(self, name: Hashable) -> Tensor:
        """A copy of a tensor that was kept, on the CPU."""
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        left, at = _bytes_of(tensor), place.offset
        while left:
            read = os.preadv(self._file, [left], at)
            assert read
            left, at = left[read:], at + read
        return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def scratch_folder() -> str:
    """Where large temporary files lie."""
    if "TMPDIR" not in os.environ and _LARGE_FILES.is_dir() and os.access(_LARGE_FILES, os.W_OK):
        return str(_LARGE_FILES)
    return tempfile.gettempdir()
