"""Training in several processes that torchrun or slurm started: the first process leads, the others train along.

Only the leader knows the run, its stages and its files. Before each training it sends the others an order, the
arguments of the training.
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
"""How long the others wait for an order: meanwhile the leader judges, exports and builds."""


@dataclass(slots=True)
class Crew:
    """The processes of a training; a single process is a crew, too, without anybody to send orders to.

    Attributes:
        is_leader: whether this is the first process.
        group: of torch.distributed, for orders; None for a single process.
        busy: whether the others carry out an order, and do not listen.
    """

    is_leader: bool = True
    group: Any = None
    busy: bool = False

    @property
    def size(self) -> int:
        """Processes that train."""
        return 1 if self.group is None else int(dist.get_world_size(self.group))

    def tell(self, order: dict[str, Any]) -> None:
        """Send the others what to train, arguments by name."""
        if self.group is not None:
            dist.broadcast_object_list([order], src=0, group=self.group)
            self.busy = True

    def finish(self) -> None:
        """Note that the last order is carried out: the others listen again."""
        self.busy = False

    def dismiss(self) -> None:
        """Send the others home."""
        if self.group is not None:
            dist.broadcast_object_list([None], src=0, group=self.group)
            self.group = None

    def orders(self) -> Iterator[dict[str, Any]]:
        """Orders of the leader, until it sends this process home."""
        while True:
            received: list[Any] = [None]
            dist.broadcast_object_list(received, src=0, group=self.group)
            if received[0] is None:
                return
            yield received[0]


ALONE = Crew()


def _slurm_places() -> dict[str, str]:
    """The environment variables that torchrun would set, from those that slurm sets for a process of `srun`."""
    slurm = os.environ
    first = subprocess.run(
        ["scontrol", "show", "hostnames", slurm["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    gpus = max(1, torch.cuda.device_count())  # 1 where slurm shows every task its own GPU alone
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

    A leader that fails while the others wait for orders sends them home. While they train they do not listen; then
    torchrun or slurm ends them, since a process of the group ended.
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
                with suppress(RuntimeError):  # another process ended already, and says why
                    crew.dismiss()
            crew.group = None  # a group that is kept keeps threads, which abort the interpreter when it ends
