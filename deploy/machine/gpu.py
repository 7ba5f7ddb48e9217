"""The NVIDIA GPU that this process computes on, asked of CUDA's driver: that needs no library and allocates nothing.

CUDA counts only the GPUs that CUDA_VISIBLE_DEVICES shows it, in that order, and otherwise the fastest first; a number
therefore means one GPU to PyTorch, ONNX Runtime and TensorRT, which all ask CUDA, and may mean another one to NVML.
Between the two a GPU, or a MIG part of one, is known by its UUID.
"""

import ctypes
import functools
import sys
import uuid
from typing import Any

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


def current_gpu() -> int:
    """CUDA's number of the GPU that is computed on: PyTorch's current one, which is the first unless one was set."""
    torch: Any = sys.modules.get("torch")  # nobody has set one where it was never imported
    return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_initialized() else 0


def release_cached_memory() -> None:
    """Give back the GPU memory that PyTorch holds and does not use: other libraries cannot have it otherwise."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of the current GPU, such as (8, 9); None without a usable GPU."""
    return _compute_capability(current_gpu())


def gpu_uuid() -> str | None:
    """UUID of the current GPU, or of the MIG part that stands for it, without a prefix; None where none is known."""
    driver, device, content = _driver(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    # the second version knows MIG parts
    ask = getattr(driver, "cuDeviceGetUuid_v2", None) or getattr(driver, "cuDeviceGetUuid", None)
    if ask is None or driver.cuDeviceGet(ctypes.byref(device), current_gpu()) or ask(ctypes.byref(content), device):
        return None
    return str(uuid.UUID(bytes=bytes(content)))


def driver_problem() -> str | None:
    """Why CUDA's driver serves no GPU here, in a sentence; None when it does."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return f"No NVIDIA driver was found: {_LIBRARY} cannot be loaded."
    code = driver.cuInit(0)
    if code == 0:
        return None
    name = ctypes.c_char_p()
    known = driver.cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value is not None
    said = name.value.decode("ascii", "replace") if known and name.value else f"error {code}"
    return f"The NVIDIA driver is there, but answers {said}."


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves, such as (13, 0); None without a driver that works."""
    version = ctypes.c_int()
    driver = _driver()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


@functools.cache
def _driver() -> Any:
    """The driver's library, ready to be asked; None without a GPU that works."""
    return ctypes.CDLL(_LIBRARY) if driver_problem() is None else None


@functools.cache
def _compute_capability(gpu: int) -> tuple[int, int] | None:
    driver, device, major, minor = _driver(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls_succeed = (
        driver is not None
        and driver.cuDeviceGet(ctypes.byref(device), gpu) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device) == 0
    )
    return (major.value, minor.value) if calls_succeed else None
