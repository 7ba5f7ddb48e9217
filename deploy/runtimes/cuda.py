"""Whether this machine has an NVIDIA GPU to run on."""

import torch

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


def missing_to_run_on_gpu() -> Missing | None:
    """What is missing to run an engine on a GPU: the GPU, or a PyTorch that sees it, whose tensors are the buffers."""
    missing = missing_gpu()
    if missing is not None or torch.cuda.is_available():
        return missing
    return Missing(
        why=f"This PyTorch ({torch.__version__}) sees no GPU, and engines on GPUs read and write its tensors.",
        fix="Install a build of PyTorch for the driver's CUDA; `upvits-deploy doctor` says which that is.",
    )
