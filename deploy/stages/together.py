"""Parts of stages that all processes of a job compute together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.document import Recipe
from upvits.deploy.recipe.request import Job, resolve
from upvits.toolchain.processes.crew import crew

T = TypeVar("T")


def together(job: Job, function: Callable[..., T], *args: Any) -> T:
    """Call `function(job, *args)` in all processes of a job; returns what it gives here, in the first one.

    Each process has a job of its own, made from the same recipe: networks and data are read where it runs.

    Args:
        job: of the first process.
        function: of a module; the others find it by its name.
        args: are sent to the others, tensors on the CPU.

    Raises:
        UserError: as `function` raises it, or the data of another process are not the same.
    """
    if crew().size == 1:
        return function(job, *args)
    _JOB[:] = [job]
    result: T = crew().together(_take_part, job.recipe, job.inputs, function, args)
    return result


_JOB: list[Job] = []
"""The job of this process, where it has one already."""


def _take_part(recipe: Recipe, inputs: dict[str, str], function: Callable[..., T], args: tuple[Any, ...]) -> T:
    if not _JOB or _JOB[0].recipe != recipe:
        _JOB[:] = [resolve(recipe, quiet=True)]
    job = _JOB[0]
    different = [name for name, digest in inputs.items() if job.inputs[name] != digest]
    if different:
        raise UserError(
            f"What this process read is not what the first one read: {' and '.join(different)}.",
            why="All processes of a job work on the same network and images.",
            fix="Give every machine the same files.",
        )
    return function(job, *args)
