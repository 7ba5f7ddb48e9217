"""Training in several processes that torchrun or slurm started: the first one leads, the others train along.

Only the leader knows the run, its stages and its files. Before each training it tells the others what to train on.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from upvits.toolchain.training.processes import join_processes

_PATIENCE = timedelta(days=2)
"""So long the others wait while the leader judges, exports and builds."""


@dataclass(slots=True)
class Crew:
    """The processes of a training. Alone, there is nobody to tell."""

    is_leader: bool = True
    group: Any = None
    busy: bool = False

    @property
    def size(self) -> int:
        """Processes that train."""
        return 1 if self.group is None else int(dist.get_world_size(self.group))

    def tell(self, order: dict[str, Any]) -> None:
        """What to train, arguments by name."""
        if self.group is not None:
            dist.broadcast_object_list([order], src=0, group=self.group)
            self.busy = True

    def finish(self) -> None:
        """The last order is carried out: the others listen again."""
        self.busy = False

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


ALONE = Crew()


def _slurm_places() -> dict[str, str]:
    """What torchrun would say, from what slurm says to a process of `srun`."""
    slurm = os.environ
    first = subprocess.run(
        ["scontrol", "show", "hostnames", slurm["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    gpus = max(1, torch.cuda.device_count())  # one where every task sees its own only
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": str(int(slurm["SLURM_LOCALID"]) % gpus),
        "MASTER_ADDR": slurm.get("MASTER_ADDR", first),
        "MASTER_PORT": slurm.get("MASTER_PORT", str(20000 + int(slurm["SLURM_JOB_ID"]) % 20000)),
    }


@contextmanager
def gathered(device: str = "auto") -> Iterator[Crew]:
    """Join the processes that torchrun or slurm started.

    When the leader fails while the others wait for orders, they are let go. While they train they cannot hear: then its
    end ends them, which is torchrun's and slurm's work.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in os.environ:
        os.environ.update(_slurm_places())
    with join_processes(device) as process:
        if process.world_size == 1:
            yield Crew()
            return
        crew = Crew(process.is_main, dist.new_group(backend="gloo", timeout=_PATIENCE))
        try:
            yield crew
        finally:
            if crew.is_leader and not crew.busy:
                with suppress(RuntimeError):  # one of them ended already, and says why
                    crew.dismiss()
            crew.group = None  # whoever keeps it keeps its threads, which abort the interpreter when it ends
