"""Tensors that would take too much memory, on disk for as long as they are needed."""

from __future__ import annotations

import errno
import math
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upvits.calib_data.errors import UserError

_LARGE_FILES = Path("/var/tmp")
"""Where systems want large temporary files: what lies in /tmp may take memory."""


class Scratch:
    """Tensors of one shape and type, by number, in a file without a name: it is gone with this process, however that
    ends.

    Tensors are copied on the way in and out, so that the file takes no memory but what the system has to spare. The
    file lies where `TMPDIR` says, or else in /var/tmp.

    Example:
        >>> kept = Scratch()
        >>> kept[3] = torch.ones(2)
        >>> kept[3]
        tensor([1., 1.])
    """

    def __init__(self) -> None:
        with tempfile.TemporaryFile(dir=scratch_folder()) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._shape: torch.Size | None = None
        self._dtype = torch.float32

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        """Keep a tensor of any device.

        Raises:
            UserError: the disk is full.
        """
        whole = tensor.detach().cpu().contiguous()
        if self._shape is None:
            self._shape, self._dtype = whole.shape, whole.dtype
        assert (whole.shape, whole.dtype) == (self._shape, self._dtype)
        left, at = _bytes_of(whole), number * whole.numel() * whole.element_size()
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

    def __getitem__(self, number: int) -> Tensor:
        """A copy of a tensor that was kept, on the CPU."""
        assert self._shape is not None
        tensor = torch.empty(self._shape, dtype=self._dtype)
        left = _bytes_of(tensor)
        at = number * math.prod(self._shape) * tensor.element_size()
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
