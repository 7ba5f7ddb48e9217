"""The machine and the libraries that a number was measured with."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from upvits.deploy.machine.gpu_monitor import Gpu, nvidia_driver

_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxslim",
    "onnx-graphsurgeon",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
    "mmdet",
)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Environment:
    """What a measurement was made on.

    Attributes:
        cores_usable: physical cores that this process may use.
        load_average: of the last minute, when the environment was read; None where the system has none.
        memory_gib: RAM of the machine in GiB.
        driver: version of the NVIDIA driver, None without one.
        libraries: versions of the installed libraries that matter, by distribution name.
    """

    version: str
    python: str
    system: str
    cpu: str
    cores_usable: int
    load_average: float | None
    memory_gib: float
    gpus: tuple[Gpu, ...]
    driver: str | None
    libraries: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def environment() -> Environment:
    """Read what this machine and this process are, now."""
    driver, gpus = nvidia_driver()
    return Environment(
        version=_version("upvits-deploy") or "not installed",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_model(),
        cores_usable=usable_cores(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=gpus,
        driver=driver,
        libraries={name: version for name in _LIBRARIES if (version := _version(name)) is not None},
    )


@functools.cache
def usable_cores() -> int:
    """Physical cores that this process may use: affinity and container limits count, hyper-threads do not."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in allowed})
    if not hasattr(os, "sched_getaffinity"):
        cores = psutil.cpu_count(logical=False) or cores
    return max(1, min(cores, _container_limit() or cores))


def _siblings(cpu: int) -> str:
    """Names the physical core of a logical one; the logical one itself where the system does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _container_limit() -> int | None:
    try:
        quota, period = _CGROUP_LIMIT.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def builder_facts(libraries: Sequence[str], *, on_cpu: bool) -> dict[str, str]:
    """What makes an engine invalid elsewhere: the versions of these libraries, and the device that it is built for."""
    here = environment()
    versions = {name: here.libraries[name] for name in libraries if name in here.libraries}
    if on_cpu:  # these are tuned to the cores that they may use
        device = f"{here.cpu}, {here.cores_usable} cores"
    else:
        device = ", ".join([*(gpu.name for gpu in here.gpus[:1]), *([f"driver {here.driver}"] if here.driver else [])])
    return {"library": json.dumps(versions, sort_keys=True), "device": device}
