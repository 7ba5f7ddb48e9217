"""Training in several processes that torchrun or slurm started: the first one leads, the others train along.

Only the leader knows the run, its stages and its files. Before each training it tells the others what to train on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from detection import openmm
from toolchain.processes import join_processes

_PATIENCE = timedelta(days=2)
"""So long the others wait while the leader judges, exports and builds."""


@dataclass(slots=True)
class Crew:
    """The processes of a training. Alone, there is nobody to tell."""

    is_leader: bool = True
    group: Any = None

    def tell(self, order: dict[str, Any]) -> None:
        """What to train, arguments by name."""
        if self.group is not None:
            dist.broadcast_object_list([order], src=0, group=self.group)

    def dismiss(self) -> None:
        """End the others' work."""
        if self.group is not None:
            dist.broadcast_object_list([None], src=0, group=self.group)
            self.group = None

    def orders(self) -> Iterator[dict[str, Any]]:
        """What the leader tells, until it ends."""
        while True:
            heard: list[Any] = [None]
            dist.broadcast_object_list(heard, src=0, group=self.group)
            if heard[0] is None:
                return
            yield heard[0]


@contextmanager
def gathered(device: str = "auto") -> Iterator[Crew]:
    """Join the processes that torchrun or slurm started; whatever happens to the leader, the others are let go."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in os.environ:
        openmm.join_slurm()
    with join_processes(device) as process:
        if process.world_size == 1:
            yield Crew()
            return
        crew = Crew(process.is_main, dist.new_group(backend="gloo", timeout=_PATIENCE))
        try:
            yield crew
        finally:
            if crew.is_leader:
                with suppress(RuntimeError):  # one of them ended already, and says why
                    crew.dismiss()
