"""Processes of their own, forked from a server that has everything imported: torch and timm are imported once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_IMPORTED = (
    "onnxruntime", "onnxslim", "onnxscript", "torch._dynamo", "upvits.deploy.pipeline", "upvits.deploy.cli.app",
)  # fmt: skip


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a function of a module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def start_command(arguments: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Start a command of the command line, on one thread; what it prints is added to the file `output`."""
    return start(_run_command, list(arguments), output, dict(environment or {}))


def exit_codes(started: Iterable[BaseProcess], seconds: float = 400) -> list[int | None]:
    """How processes end; None of one that has not ended in time."""
    deadline, codes = time.monotonic() + seconds, []
    for process in started:
        process.join(timeout=max(0, deadline - time.monotonic()))
        codes.append(process.exitcode)
    return codes


def _run_command(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    import torch

    from upvits.__main__ import run

    os.environ.update(environment)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["upvits-deploy", *arguments]
    run()
