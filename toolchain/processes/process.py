"""One process or several: the device this process works on, its share of the work, sums over all processes.

Functions that sum over images ask `shared` who takes part in them. Outside of `sharing` it is this process alone;
inside, all processes have called the same function with the same arguments, each computes its share of the batches, and
all of them get the sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from upvits.calib_data.errors import MissingDependencyError, UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Part(Sequence[tuple[int, T]]):
    """Some of a sequence of batches, each with its number."""

    items: Sequence[T]
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:  # by position only, nobody slices
        number = self.numbers[index]
        return number, self.items[number]


@dataclass(frozen=True, slots=True)
class Process:
    """This process among its equals; only the first one writes files and shows progress.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        objects: group of torch.distributed for Python objects; None: the default group.
    """

    rank: int = 0
    world_size: int = 1
    objects: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> _Part[T]:
        """This process's part of some batches, each with its number; every batch is in exactly one part.

        A batch is asked for when it is looked at, and again each time: nothing is kept.
        """
        return _Part(items, range(self.rank, len(items), self.world_size))

    def sum(self, *values: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world_size > 1:
            for value in values:
                dist.all_reduce(value)

    def all_of(self, parts: Mapping[int, T]) -> list[T]:
        """What all processes found, by number, in the order of the numbers; tensors have to be on the CPU."""
        found = dict(parts)
        if self.world_size > 1:
            gathered: list[Any] = [None] * self.world_size
            dist.all_gather_object(gathered, found, group=self.objects)
            found = {number: part for one in gathered for number, part in one.items()}
        return [found[number] for number in sorted(found)]

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them.

        Used where equal sums could give unequal results: linear algebra differs between kinds of CPUs.
        """
        if self.world_size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except UserError as error:  # the others raise it, too, and all go on together
                made[1] = error
        dist.broadcast_object_list(made, src=0, group=self.objects)
        if made[1] is not None:
            raise made[1]
        result: T = made[0]
        return result

    def agree_on(self, model: nn.Module) -> None:
        """Give a network the weights that it has in the first process."""
        if self.world_size > 1:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    self.same(tensor)

    def same(self, tensor: Tensor) -> None:
        """Give a tensor the values that it has in the first process."""
        if self.world_size > 1:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.detach().copy_(whole)


ALONE = Process()
_SHARED: ContextVar[Process] = ContextVar("upvits_shared", default=ALONE)


def shared() -> Process:
    """This process among those that run the present function together."""
    return _SHARED.get()


@contextmanager
def sharing(process: Process) -> Iterator[None]:
    """What runs inside runs in all processes, with equal arguments, and shares its batches."""
    token = _SHARED.set(process)
    try:
        yield
    finally:
        _SHARED.reset(token)


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU when there is one, else the CPU; any torch device name is taken as it is.

    Raises:
        UserError: the name means nothing to torch.
        MissingDependencyError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
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
        return _own_gpu()
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise MissingDependencyError(f"There is no {name}: torch sees {torch.cuda.device_count()} GPUs.")
    return device


def _own_gpu() -> torch.device:
    """This process's; slurm may show every process its own GPU alone, as number 0."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
