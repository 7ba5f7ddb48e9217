"""Several processes that torchrun or slurm started for one job: the first one leads, the others join where it asks.

Only the leader runs the command: it owns the run directory, its lock, the terminal and every stage. What is worth
sharing is a function that it calls with `together`; the others are told its name and arguments, and call it, too.
Orders go over gloo, where waiting costs no processor time, and may take days to come.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from upvits.calib_data.errors import UserError
from upvits.toolchain.processes.launchers import number_of_processes, set_places
from upvits.toolchain.processes.process import ALONE, Process, shared, sharing
from upvits.toolchain.processes.watch import Speak, Watch, speak_plainly

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for each other: the leader exports and builds meanwhile. `Watch` says when one died."""

_TERMINATED = 128 + signal.SIGTERM
_JOINING = timedelta(minutes=10)
"""How long processes wait for all to have started."""
_ANSWER_SECONDS = 20.0
"""How long the first process may take to answer once it listens; another program on its port may never do."""


@dataclass(slots=True)
class Crew:
    """The processes of a job as one of them sees it; a single process is a crew, too.

    Attributes:
        process: this one among them.
        watch: its connections to the others; None for a single process.
    """

    process: Process = ALONE
    watch: Watch | None = None

    @property
    def is_leader(self) -> bool:
        return self.process.is_main

    @property
    def size(self) -> int:
        return self.process.world_size

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of a module in all processes; returns what it gives in this one, the leader.

        Args:
            function: the others find it by its name.
            args: are sent to them, tensors on the CPU.
        """
        if self.watch is None or shared() is self.process:
            return function(*args)
        self._broadcast((function, args))
        return self._carry_out(function, args)

    def follow(self) -> None:
        """Take part in what the leader does together, until it has ended."""
        assert self.watch is not None
        while (order := self._broadcast(None)) is not None:
            try:
                self._carry_out(*order)
            except Exception as error:
                self.watch.report(error)

    def dismiss(self) -> None:
        """Let the others end: nothing more is done together."""
        self._broadcast(None)

    def _broadcast(self, order: Any) -> Any:
        told = [order]
        dist.broadcast_object_list(told, src=0, group=self.process.objects)
        return told[0]

    def _carry_out(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        assert self.watch is not None
        self.watch.order += 1
        try:
            with sharing(self.process):
                return function(*args)
        except Exception:
            self.watch.failed = self.watch.order
            raise


_HERE: list[Crew] = []
_MEETINGS = count()
"""Numbers the groups of this process: a store keeps what was written for an earlier one."""


def crew() -> Crew:
    """The crew that this process belongs to."""
    return _HERE[-1] if _HERE else Crew()


@contextmanager
def gathered(speak: Speak = speak_plainly) -> Iterator[Crew]:
    """Join the processes that torchrun or slurm started.

    When one dies, all end with one message. When the leader fails, the others end without a word, with its exit code.

    Args:
        speak: says an error that ends this process from another thread, and returns the exit code.

    Raises:
        UserError: they cannot find each other, or were started with different commands.
    """
    if number_of_processes() == 1:
        yield Crew()
        return
    with _joined() as process:
        watch = Watch(dist.new_group(backend="gloo", timeout=PATIENCE), process.rank, process.world_size, speak)
        gang = Crew(process, watch)
        _HERE.append(gang)
        try:
            _require_same_command(process)
            yield gang
            if gang.is_leader:
                gang.dismiss()
            watch.part()
        except BaseException as error:
            _part_in_trouble(gang, error)
            raise
        finally:
            _HERE.clear()


def _part_in_trouble(gang: Crew, error: BaseException) -> None:
    """The leader's command has ended, by an error or by `sys.exit`, which may also be its regular end."""
    assert gang.watch is not None
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    if code == _TERMINATED or not isinstance(error, (UserError, SystemExit)):
        gang.watch.wait_for_verdict()  # torchrun ends the others where one died, maybe before that is noticed here
    if not gang.is_leader:
        return
    if code in (0, None):
        gang.dismiss()
        gang.watch.part()
    else:
        gang.watch.send_home(code if isinstance(code, int) else 1)


def _require_same_command(process: Process) -> None:
    commands = process.all_of({process.rank: sys.argv[1:]})
    other = next((rank for rank, command in enumerate(commands) if command != commands[0]), None)
    if other is not None:
        raise UserError(
            f"Process {other} was started with `{' '.join(commands[other])}`, the first one with "
            f"`{' '.join(commands[0])}`.",
            why="All processes of a job do the same.",
            fix="Give torchrun the same command on every machine.",
        )


@contextmanager
def _joined() -> Iterator[Process]:
    """A group of torch.distributed of all processes: gloo for tensors on the CPU, nccl for those on GPUs."""
    set_places()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, size = _meet()
        # torchrun keeps its store when it starts all processes again: what the dead ones wrote is not for these
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # and a program may train twice
        store = dist.PrefixStore(f"attempt {attempt}, meeting {next(_MEETINGS)}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError, OverflowError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise UserError(
            f"The processes of this job cannot meet at {place}.",
            why=str(error).strip().splitlines()[0],
            fix="Check that all of them were started, and that the port is free; MASTER_PORT, or what starts them, "
            "sets another.",
        ) from error
    try:
        yield Process(rank, size, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()
        # wrapped models die in cycles; threads of a group that they hold abort the interpreter when it ends
        gc.collect()


def _meet() -> tuple[Any, int, int]:
    """The store in which all processes find each other, the number of this one, and how many there are.

    Raises:
        RuntimeError, ValueError: torch says why they do not.
    """
    if os.environ.get("RANK") == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        found: tuple[Any, int, int] = next(rendezvous("env://", timeout=_JOINING))
        return found
    place = (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0")))
    deadline = time.monotonic() + _JOINING.total_seconds()
    while time.monotonic() < deadline:  # until the first process listens
        with suppress(OSError), socket.create_connection(place, timeout=5):
            break
        time.sleep(0.2)
    met: list[tuple[Any, int, int] | Exception] = []

    def greet() -> None:
        try:
            met.append(next(rendezvous("env://", timeout=_JOINING)))
        except Exception as error:
            met.append(error)

    greeting = threading.Thread(target=greet, daemon=True)  # torch's own limit does not hold here
    greeting.start()
    greeting.join(_ANSWER_SECONDS)
    answer = met[0] if met else RuntimeError("What listens there does not answer: it is another program.")
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def join_processes() -> Iterator[Process]:
    """The processes that train together: those of an order, or all that torchrun started where there is no crew.

    A leader outside of `together` is alone. A group that the caller already set up is used and left alone.
    """
    if shared().world_size > 1 or _HERE:
        yield shared()
    elif dist.is_available() and dist.is_initialized():
        yield Process(dist.get_rank(), dist.get_world_size())
    elif number_of_processes() > 1:
        with _joined() as process:
            yield process
    else:
        yield ALONE
