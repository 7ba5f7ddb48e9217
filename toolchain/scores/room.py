"""How many images fit into memory at once, and what to do when they do not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import segments_of
from upvits.toolchain.scores.backward import frozen

T = TypeVar("T")

ENOUGH = 2_000_000_000
"""Bytes that a pass takes at most where there is plenty: larger ones are not faster, and the same number of images at
once wherever there is enough gives the same rounding."""

SHARE = 0.5
"""Of the free memory that a pass may take where there is less."""

TIMES = 3
"""A pass takes about so many times what autograd keeps: gradients, copies in float64, what the allocator holds back."""

_CGROUP = Path("/sys/fs/cgroup")
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)

_log = logging.getLogger(__name__)


def images_at_once(model: nn.Module, image: Tensor, most: int) -> int:
    """How many images fit into a pass with gradients through one segment after another, `most` at most.

    Args:
        model: of a supported family, in eval mode.
        image: one of them, [1, 3, H, W].
        most: what is asked for.
    """
    room = min(ENOUGH, SHARE * free_bytes(image.device))
    return max(1, min(most, int(room / (TIMES * _kept_bytes(model, image)))))


def _kept_bytes(model: nn.Module, image: Tensor) -> int:
    """What autograd keeps for one image of the largest segment, and the streams between all segments."""
    network = frozen(model)
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    streams, largest = 0, 0
    with torch.inference_mode(False):
        stream = image.clone()
        for segment in segments_of(network):
            kept: dict[int, int] = {}

            def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                if tensor.data_ptr() not in weights:
                    kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
                return tensor

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                after = segment.run(stream.requires_grad_())
            streams += stream.numel() * stream.element_size()
            largest = max(largest, sum(kept.values()))
            stream = after.detach()
    return streams + largest


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken: on a GPU, or of this machine within the limit of its container."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held_back
    return min(int(psutil.virtual_memory().available), _free_in_container(_CGROUP))


def _free_in_container(folder: Path) -> int:
    """What the control group (version 2) leaves; no end where there is no limit."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such group, or "max"
        return 1 << 62
    return max(0, limit - used + (int(cached[1]) if cached else 0))


def with_room(work: Callable[[int], T], size: int) -> T:
    """`work(size)`; where memory runs out, again from its beginning with half as many images at once.

    Args:
        work: must not talk to other processes: they do not start again.
        size: images at once.

    Raises:
        UserError: there is not enough memory for a single image.
    """
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
                raise
            if size == 1:
                raise UserError(
                    "Memory runs out with a single image at a time.",
                    why=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}." if str(error) else "",
                    fix="Close other programs, give smaller images or a smaller network, or use a machine with more "
                    "memory.",
                ) from error
        size //= 2
        _log.warning("Memory ran out; once more with %d images at a time.", size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
