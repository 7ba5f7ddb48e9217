"""Inputs and outputs of engines on GPUs: pinned memory on the host, from which copies are fast, and memory of the GPU.

On CPUs both are one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from upvits.calib_data.errors import UserError

LESS_MEMORY = "Use smaller batches or fewer streams, build with a smaller largest batch, or free GPU memory."


@dataclass(frozen=True, slots=True)
class Buffer:
    """One input or output, on the host and on the device."""

    host: torch.Tensor
    device: torch.Tensor

    def fill(self, array: np.ndarray[Any, Any]) -> None:
        """Put an array of the buffer's shape into its host side."""
        dtype = self.host.numpy().dtype
        self.host.copy_(torch.from_numpy(np.ascontiguousarray(array, dtype)))


def new_buffer(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Buffer:
    """A buffer for arrays of a shape and type; `device` as PyTorch names it, such as "cpu" or "cuda:0".

    Raises:
        UserError: GPU memory ran out.
    """
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    if device == "cpu":
        memory = torch.empty(shape, dtype=kind)
        return Buffer(memory, memory)
    try:
        host = torch.empty(shape, dtype=kind, pin_memory=True)
        return Buffer(host, torch.empty(shape, dtype=kind, device=device))
    except torch.OutOfMemoryError as error:
        raise UserError("GPU memory ran out", why=str(error).splitlines()[0], fix=LESS_MEMORY) from error
