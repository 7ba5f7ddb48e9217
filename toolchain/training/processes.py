"""One process or several: the device this process works on, its share of the data, sums over all processes.

Started by hand there is one process; started by `torchrun` there are WORLD_SIZE of them, which share every batch.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from upvits.calib_data import Images
from upvits.calib_data.errors import MissingDependencyError, UserError


@dataclass(frozen=True, slots=True)
class Process:
    """This process among its equals; only the main one writes files and shows progress."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def training_share(self, images: Images, seed: int, epoch: int) -> Images:
        """This process's part of the epoch: another random split each epoch, of equal size everywhere.

        Equal sizes keep the processes in step; up to `world_size - 1` images sit out an epoch.
        """
        if self.world_size == 1:
            return images
        generator = torch.Generator().manual_seed(seed + epoch)
        order: list[int] = torch.randperm(len(images), generator=generator).tolist()
        share = len(images) // self.world_size
        return _part(images, order[self.rank * share : (self.rank + 1) * share])

    def validation_share(self, images: Images) -> Images:
        """Every `world_size`-th image: each image is in exactly one share."""
        if self.world_size == 1:
            return images
        return _part(images, list(range(self.rank, len(images), self.world_size)))


def _part(images: Images, chosen: list[int]) -> Images:
    return Images([images.labels[index] for index in chosen], lambda position: images[chosen[position]][0])


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU when there is one, else the CPU; any torch device name is taken as it is.

    Raises:
        UserError: the name means nothing to torch.
        MissingDependencyError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Unknown device {name!r}.", fix="Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"Device {name!r} is not supported.", fix="Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            f"Device {name!r} was asked for, but torch sees no GPU.",
            why="There is none, it has no driver, or this torch was built for CPUs only.",
            fix="Use auto or cpu, or see `upvits-deploy doctor`.",
        )
    if name == "cuda":  # CUDA calls want to know which one
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise MissingDependencyError(f"There is no {name}: torch sees {torch.cuda.device_count()} GPUs.")
    return device


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Process]:
    """Joins the other processes that `torchrun` started (nccl on CUDA, else gloo); leaves the group at the end.

    A group that the caller already set up is used and left alone.

    Raises:
        UserError: see `pick_device`.
    """
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    owner = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if owner:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        joined = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        yield Process(rank, world_size, chosen)
    finally:
        if owner:
            dist.destroy_process_group()
            # wrapped models die in cycles; threads of a group that they hold abort the interpreter when it ends
            gc.collect()
