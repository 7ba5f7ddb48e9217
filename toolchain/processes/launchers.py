"""What torchrun and slurm tell a process about the others. Imports no torch: every command asks it first."""

from __future__ import annotations

import os
import re
import subprocess

from upvits.calib_data.errors import UserError

_PORTS = range(20_000, 40_000)


def number_of_processes() -> int:
    """How many processes were started for this job. torchrun's word counts before slurm's.

    Only a step that `srun` started has several tasks; the script of `sbatch` is one process, whatever it reserved.

    Raises:
        UserError: the environment says something else than a number.
    """
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if said := os.environ.get(name):
            if not re.fullmatch("[1-9][0-9]{0,5}", said, re.ASCII):
                raise UserError(
                    f"The environment variable {name} is {said[:50]!r}.",
                    why="torchrun and srun say in it how many processes work together.",
                    fix=f"Remove it (`unset {name}`), or start the command by torchrun or srun.",
                )
            return int(said)
    return 1


def set_places() -> None:
    """Set the environment variables that torchrun sets, from those of slurm where torchrun did not start this process.

    Raises:
        UserError: slurm does not say where the first task runs.
    """
    slurm = os.environ
    if "RANK" in slurm or "SLURM_STEP_NUM_TASKS" not in slurm:
        return
    step = int(slurm.get("SLURM_STEP_ID", "0"))
    port = _PORTS[(int(slurm["SLURM_JOB_ID"]) + 997 * step) % len(_PORTS)]  # another one for every step of a job
    places = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or _first_node(),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(port),
    }
    os.environ.update(places)


def _first_node() -> str:
    if os.environ.get("SLURM_STEP_NUM_NODES", "") == "1":
        return "127.0.0.1"
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            "The processes cannot find the first one of them.",
            why=f"`{' '.join(command)}` does not name its machine: {error}.",
            fix="Name it yourself: export MASTER_ADDR=HOST before srun.",
        ) from error
