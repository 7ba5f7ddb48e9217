"""The NVIDIA GPUs of this machine, and what they do while something is measured: clocks, power, temperature, memory.

The only file that uses NVML (nvidia-ml-py, imported as pynvml). It reads and never changes a setting. Without the
library, a driver or a GPU there is simply nothing to tell.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from upvits.deploy.machine.gpu import gpu_uuid

_SAMPLE_SECONDS = 0.1

# Bits of nvmlDeviceGetCurrentClocksEventReasons, by the end of their constants' names. Those that only say that nobody
# asked for more (idle, clocks set by the user or an application) do not slow a measurement down.
_SLOWING = (
    "SwPowerCap",
    "HwSlowdown",
    "SyncBoost",
    "SwThermalSlowdown",
    "HwThermalSlowdown",
    "HwPowerBrakeSlowdown",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it; memory in GiB, None where the driver does not tell."""

    name: str
    memory_gib: float | None


@dataclass(frozen=True, slots=True)
class GpuSample:
    """The state of a GPU at one moment; None where its driver does not tell.

    Attributes:
        seconds: since the monitor was opened.
        sm_mhz, memory_mhz: clocks.
        watts: power draw.
        celsius: temperature of the chip.
        memory_mb: memory in use by all processes, in 10**6 bytes.
        throttled: why its clocks are held down, such as "SwPowerCap".
    """

    seconds: float
    sm_mhz: float | None
    memory_mhz: float | None
    watts: float | None
    celsius: float | None
    memory_mb: float | None
    throttled: tuple[str, ...]


class GpuMonitor:
    """Context manager that watches the GPU that is computed on: before, every 100 ms in a thread, and after.

    Afterwards `samples` holds what was seen and `joules` the energy spent; on machines without an NVIDIA driver they
    are empty and None.

    Attributes:
        name: of the GPU.
        power_limit_watts: the cap that is in force.
        joules: by the GPU's energy counter where it has one, otherwise the integral of the power samples.
        joules_source: "energy counter" or "integral of power".
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.power_limit_watts: float | None = None
        self.samples: list[GpuSample] = []
        self.joules: float | None = None
        self.joules_source: str | None = None
        self._nvml: Any = None
        self._device: Any = None
        self._started = 0.0
        self._energy_before: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-monitor", daemon=True)

    def __enter__(self) -> GpuMonitor:
        self._nvml = _open_nvml()
        if self._nvml is None:
            return self
        self._device = _current_device(self._nvml)
        if self._device is None:
            self._close()
            return self
        self.name = self._read(self._nvml.nvmlDeviceGetName)
        self.power_limit_watts = _scaled(self._read(self._nvml.nvmlDeviceGetEnforcedPowerLimit), 1e-3)
        self._energy_before = self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        self._started = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is None:
            return
        self._done.set()
        self._thread.join()
        self._sample()
        self._count_energy()
        self._close()

    def as_json(self) -> dict[str, Any]:
        """Summary for reports as plain JSON values: before, during (lowest, median, highest) and after; {} unseen."""
        if not self.samples:
            return {}
        quantities = ("sm_mhz", "memory_mhz", "watts", "celsius", "memory_mb")
        during = {name: _range([getattr(sample, name) for sample in self.samples]) for name in quantities}
        reasons = sorted({reason for sample in self.samples for reason in sample.throttled})
        return {
            "name": self.name,
            "power_limit_watts": self.power_limit_watts,
            "seconds": self.samples[-1].seconds,
            "samples": len(self.samples),
            "before": asdict(self.samples[0]),
            "during": {name: value for name, value in during.items() if value is not None},
            "after": asdict(self.samples[-1]),
            "throttled": {r: sum(r in s.throttled for s in self.samples) / len(self.samples) for r in reasons},
            "joules": self.joules,
            "joules_source": self.joules_source,
        }

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        nvml = self._nvml
        memory = self._read(nvml.nvmlDeviceGetMemoryInfo)
        self.samples.append(
            GpuSample(
                seconds=time.perf_counter() - self._started,
                sm_mhz=self._read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
                memory_mhz=self._read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
                watts=_scaled(self._read(nvml.nvmlDeviceGetPowerUsage), 1e-3),
                celsius=self._read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
                memory_mb=None if memory is None else memory.used / 1e6,
                throttled=self._throttled(),
            )
        )

    def _throttled(self) -> tuple[str, ...]:
        # The name with "Event" is that of drivers since 535; older copies of the library have the other one.
        nvml, term = self._nvml, "Event"
        if not hasattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons"):
            term = "Throttle"
        bits = self._read(getattr(nvml, f"nvmlDeviceGetCurrentClocks{term}Reasons")) or 0
        return tuple(name for name in _SLOWING if bits & getattr(nvml, f"nvmlClocks{term}Reason{name}"))

    def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return _read(self._nvml, function, self._device, *arguments)

    def _count_energy(self) -> None:
        after = self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        powers = [(sample.seconds, sample.watts) for sample in self.samples if sample.watts is not None]
        if after is not None and self._energy_before is not None:
            self.joules, self.joules_source = (after - self._energy_before) / 1e3, "energy counter"
        elif len(powers) > 1:
            self.joules, self.joules_source = _integral(powers), "integral of power"

    def _close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
        self._nvml = None


def nvidia_driver() -> tuple[str | None, tuple[Gpu, ...]]:
    """Driver version and GPUs, the one that is computed on first; nothing without the library or a driver."""
    nvml = _open_nvml()
    if nvml is None:
        return None, ()
    try:
        numbers = range(_read(nvml, nvml.nvmlDeviceGetCount) or 0)
        asked = (_read(nvml, nvml.nvmlDeviceGetHandleByIndex, number) for number in numbers)
        handles = [handle for handle in asked if handle is not None]
        current = _current_device(nvml)
        here = None if current is None else _read(nvml, nvml.nvmlDeviceGetUUID, current)
        if here is not None:
            handles = [current, *(handle for handle in handles if _read(nvml, nvml.nvmlDeviceGetUUID, handle) != here)]
        gpus = tuple(_gpu(nvml, handle) for handle in handles)
        return _read(nvml, nvml.nvmlSystemGetDriverVersion), gpus
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = _read(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)  # GB10 shares the host's memory and does not tell
    name = _read(nvml, nvml.nvmlDeviceGetName, handle)
    return Gpu(name or "unknown", None if memory is None else round(memory.total / 2**30, 1))


def _read(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """One value; None where this GPU does not have it (small, virtual and integrated ones lack some)."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _open_nvml() -> Any:
    """The library, initialised; None without it or without a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _current_device(nvml: Any) -> Any:
    """NVML's handle of the GPU that is computed on; None where it is not known which that is.

    Where CUDA's driver does not answer, and where NVML knows no UUIDs, the only GPU of a machine is meant.
    """
    uuid = gpu_uuid()
    names = [f"{kind}-{uuid}" for kind in ("GPU", "MIG")] if uuid is not None else []
    for name in names:
        handle = _read(nvml, nvml.nvmlDeviceGetHandleByUUID, name)
        if handle is not None:
            return handle
    only = _read(nvml, nvml.nvmlDeviceGetCount) == 1
    return _read(nvml, nvml.nvmlDeviceGetHandleByIndex, 0) if only else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _range(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"min": float(min(known)), "median": float(np.median(known)), "max": float(max(known))}


def _integral(points: Sequence[tuple[float, float]]) -> float:
    """Trapezoids under (seconds, watts)."""
    seconds, watts = np.array(points).T
    return float(np.sum(np.diff(seconds) * (watts[:-1] + watts[1:]) / 2))
