"""Whether this machine has an NVIDIA GPU. The driver itself is asked: that needs no library and allocates nothing."""

import ctypes
import functools
import sys

from upvits.deploy.runtimes.interface import Missing

_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@functools.cache
def compute_capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU, such as (8, 9); None without a usable GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls_succeed = (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device) == 0
    )
    return (major.value, minor.value) if calls_succeed else None


def missing_gpu() -> Missing | None:
    """What is missing when this machine has no usable NVIDIA GPU; None when nothing is missing."""
    if compute_capability() is not None:
        return None
    return Missing(
        why="No NVIDIA GPU with a working driver was found on this machine.",
        fix="Use a machine where `nvidia-smi` lists a GPU.",
    )
