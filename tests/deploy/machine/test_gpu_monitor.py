"""GPU monitor: what NVML says is what is reported, and nothing is said without it."""

import json
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from upvits.deploy.machine import gpu_monitor
from upvits.deploy.machine.gpu_monitor import Gpu, GpuMonitor, nvidia_driver

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")


class FakeNvml(ModuleType):
    """One GPU that draws 100 W, then 300 W; it answers only to names that the real library has."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.asked: list[str] = []
        self.polled = threading.Event()
        self.missing: set[str] = set()
        self.reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
        self.answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: self._count(1),
            "nvmlShutdown": lambda: self._count(-1),
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetUUID": lambda handle: {"handle 0": "GPU-aa", "handle 1": "GPU-bb"}.get(handle, handle[7:]),
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlDeviceGetName": lambda handle: f"Test GPU {handle}",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=24 * 2**30, used=512_000_000),
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 250_000,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {pynvml.NVML_CLOCK_SM: 1700, pynvml.NVML_CLOCK_MEM: 9000}[
                kind
            ],
            "nvmlDeviceGetTemperature": lambda handle, sensor: {pynvml.NVML_TEMPERATURE_GPU: 61}[sensor],
            "nvmlDeviceGetPowerUsage": self._power,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 5_000 * self.asked.count("energy"),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: self.reasons,
        }

    def _by_uuid(self, uuid: str) -> str:
        known = {"GPU-aa": "handle 0", "GPU-bb": "handle 1", "MIG-cc": "handle MIG-cc"}
        if uuid not in known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return known[uuid]

    def _power(self, handle: str) -> int:
        polls = self.asked.count("nvmlDeviceGetPowerUsage")
        if polls >= 3:
            self.polled.set()
        return 100_000 if polls == 1 else 300_000

    def _count(self, by: int) -> None:
        self.open += by

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)  # AttributeError for a name that the library does not have
        if not callable(real) or isinstance(real, type):
            return real

        def answer(*arguments: Any) -> Any:
            assert "Set" not in name, "the monitor changed a setting"
            self.asked.append("energy" if name == "nvmlDeviceGetTotalEnergyConsumption" else name)
            if name in self.missing:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self.answers[name](*arguments)

        return answer


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu_monitor, "gpu_uuid", lambda: "aa")
    return fake


def test_samples_before_during_and_after(nvml: FakeNvml) -> None:
    with GpuMonitor() as monitor:
        assert len(monitor.samples) == 1
        assert nvml.polled.wait(10)
    report = json.loads(json.dumps(monitor.as_json()))
    assert report["name"] == "Test GPU handle 0"
    assert report["power_limit_watts"] == 250
    assert report["samples"] == len(monitor.samples) >= 4  # the one before, two of the thread, the one after
    assert report["before"]["watts"] == 100
    assert report["after"]["watts"] == 300
    assert report["during"]["watts"] == {"min": 100, "median": 300, "max": 300}
    assert report["during"]["sm_mhz"]["median"] == 1700
    assert report["during"]["memory_mhz"]["median"] == 9000
    assert report["during"]["celsius"]["max"] == 61
    assert report["during"]["memory_mb"]["max"] == 512
    # an idle GPU is not a throttled one
    assert report["throttled"] == {"SwPowerCap": 1.0}
    assert (report["joules"], report["joules_source"]) == (5.0, "energy counter")
    assert nvml.open == 0
    assert "gpu-monitor" not in {thread.name for thread in threading.enumerate()}


def test_energy_is_the_integral_of_power_without_a_counter(nvml: FakeNvml) -> None:
    nvml.missing = {"nvmlDeviceGetTotalEnergyConsumption"}
    nvml.answers["nvmlDeviceGetPowerUsage"] = lambda handle: 200_000
    with GpuMonitor() as monitor:
        time.sleep(0.25)
    assert monitor.joules_source == "integral of power"
    seconds = monitor.samples[-1].seconds - monitor.samples[0].seconds
    assert monitor.joules == pytest.approx(200 * seconds)
    assert seconds >= 0.25


def test_a_value_that_a_gpu_lacks_leaves_the_others(nvml: FakeNvml) -> None:
    nvml.missing = {
        "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetCurrentClocksEventReasons",
    }  # fmt: skip
    with GpuMonitor() as monitor:
        pass
    report = monitor.as_json()
    assert report["before"]["watts"] is None
    assert "watts" not in report["during"]
    assert report["joules"] is None
    assert report["throttled"] == {}
    assert report["during"]["sm_mhz"]["max"] == 1700


@pytest.mark.parametrize(("uuid", "handle"), [("aa", "0"), ("bb", "1"), ("cc", "MIG-cc")])
def test_the_gpu_that_is_computed_on_is_watched_and_named_first(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: str, handle: str
) -> None:
    monkeypatch.setattr(gpu_monitor, "gpu_uuid", lambda: uuid)
    with GpuMonitor() as monitor:
        pass
    assert monitor.name == f"Test GPU handle {handle}"
    _, gpus = nvidia_driver()
    assert gpus[0].name == monitor.name
    assert len({gpu.name for gpu in gpus}) == len(gpus) == (3 if handle == "MIG-cc" else 2)


@pytest.mark.parametrize("uuid", [None, "of no GPU here"])
def test_a_gpu_that_is_not_known_is_not_guessed(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: str | None
) -> None:
    monkeypatch.setattr(gpu_monitor, "gpu_uuid", lambda: uuid)
    with GpuMonitor() as monitor:
        pass
    assert monitor.as_json() == {}
    nvml.answers["nvmlDeviceGetCount"] = lambda: 1  # the only one is meant, as on Jetson
    with GpuMonitor() as monitor:
        pass
    assert monitor.name == "Test GPU handle 0"


CALLS = sorted(set(FakeNvml().answers) - {"nvmlInit", "nvmlShutdown"})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("gpus", [1, 2])
def test_any_call_that_a_device_does_not_support_is_unknown(nvml: FakeNvml, call: str, gpus: int) -> None:
    nvml.missing = {call}
    nvml.answers["nvmlDeviceGetCount"] = lambda: gpus
    with GpuMonitor() as monitor:
        pass
    json.dumps(monitor.as_json())
    version, found = nvidia_driver()
    assert version == (None if call == "nvmlSystemGetDriverVersion" else "580.1")
    unknown_memory = call == "nvmlDeviceGetMemoryInfo"
    assert {gpu.memory_gib for gpu in found} <= {None if unknown_memory else 24.0}
    if call == "nvmlDeviceGetName":
        assert {gpu.name for gpu in found} == {"unknown"}
    assert nvml.open == 0


def test_an_older_library_names_the_reasons_differently(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons")
    nvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = lambda handle: (
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    )
    with GpuMonitor() as monitor:
        pass
    assert monitor.samples[0].throttled == ("HwThermalSlowdown",)


def test_driver_and_gpus(nvml: FakeNvml) -> None:
    assert nvidia_driver() == ("580.1", (Gpu("Test GPU handle 0", 24.0), Gpu("Test GPU handle 1", 24.0)))
    assert nvml.open == 0


def test_nothing_to_tell_without_a_driver_or_the_library(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    nvml.answers["nvmlInit"] = no_driver
    with GpuMonitor() as monitor:
        pass
    assert monitor.as_json() == {}
    assert monitor.joules is None
    assert nvidia_driver() == (None, ())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuMonitor() as monitor:
        pass
    assert monitor.as_json() == {}
    assert nvidia_driver() == (None, ())


def test_a_device_that_is_not_there_is_nothing_to_tell(nvml: FakeNvml) -> None:
    nvml.missing = {"nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID"}
    with GpuMonitor() as monitor:
        pass
    assert monitor.as_json() == {}
    assert nvml.open == 0
