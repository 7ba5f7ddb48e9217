"""Whether this machine has an NVIDIA GPU to run on."""

from upvits.deploy.machine.gpu import compute_capability, driver_problem
from upvits.deploy.runtimes.interface import Missing


def missing_gpu() -> Missing | None:
    """What is missing when this machine has no usable NVIDIA GPU; None when nothing is missing."""
    if compute_capability() is not None:
        return None
    return Missing(
        why=f"No NVIDIA GPU can be used. {driver_problem() or 'The driver does not say what its GPU is.'}",
        fix="Use a machine where `nvidia-smi` lists a GPU; CUDA_VISIBLE_DEVICES has to show it.",
    )
