"""The current GPU, asked of a driver of our own."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from upvits.deploy.machine import gpu
from upvits.deploy.runtimes.cuda import missing_gpu, missing_to_run_on_gpu


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stub of the driver's library."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("stub_libcuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    for answer in (gpu._driver, gpu._compute_capability):
        answer.cache_clear()
    yield
    for answer in (gpu._driver, gpu._compute_capability):
        answer.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, library: Path | str, gpus: str, current: int | None = None) -> None:
    """Ask this library, on a machine with these GPUs, with PyTorch's current GPU set or not."""
    monkeypatch.setattr(gpu, "_LIBRARY", str(library))
    monkeypatch.setenv("STUB_GPUS", gpus)
    cuda = SimpleNamespace(is_initialized=lambda: current is not None, current_device=lambda: current)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_the_first_gpu_is_used_until_pytorch_has_a_current_one(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, driver, "gc")
    assert (gpu.current_gpu(), gpu.compute_capability()) == (0, (8, 6))
    assert gpu.gpu_uuid() == "67676767-6767-6767-6767-676767676767"
    assert gpu.driver_cuda() == (13, 2)
    use(monkeypatch, driver, "gc", current=1)
    assert (gpu.current_gpu(), gpu.compute_capability()) == (1, (8, 2))
    assert gpu.gpu_uuid() == "63636363-6363-6363-6363-636363636363"
    assert missing_gpu() is None


def test_gpus_in_another_order_are_the_same_gpus(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for order in ("bg", "gb"):
        for number in (0, 1):
            gpu._compute_capability.cache_clear()
            use(monkeypatch, driver, order, current=number)
            found[order[number], order] = (gpu.gpu_uuid(), gpu.compute_capability())
    assert found["b", "bg"] == found["b", "gb"] != found["g", "bg"] == found["g", "gb"]


def test_a_driver_that_fails_is_told_from_one_that_is_not_there(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, driver, "")
    assert gpu.driver_problem() == "The NVIDIA driver is there, but answers CUDA_ERROR_NO_DEVICE."
    missing = missing_gpu()
    assert missing is not None
    assert "CUDA_ERROR_NO_DEVICE" in missing.why
    use(monkeypatch, "libcuda_of_nobody.so.1", "a")
    assert gpu.driver_problem() == "No NVIDIA driver was found: libcuda_of_nobody.so.1 cannot be loaded."
    assert gpu.gpu_uuid() is None
    assert gpu.driver_cuda() is None


def test_an_older_driver_has_the_older_call(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, driver, "a")
    whole = ctypes.CDLL(str(driver))
    older = SimpleNamespace(cuDeviceGet=whole.cuDeviceGet, cuDeviceGetUuid=whole.cuDeviceGetUuid_v2)
    monkeypatch.setattr(gpu, "_driver", lambda: older)
    assert gpu.gpu_uuid() == "61616161-6161-6161-6161-616161616161"
    monkeypatch.setattr(gpu, "_driver", SimpleNamespace)
    assert gpu.gpu_uuid() is None


def test_a_pytorch_that_sees_no_gpu_is_named(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_LIBRARY", str(driver))
    for seen in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        missing = missing_to_run_on_gpu()
        assert (missing is None) == seen
    assert missing is not None
    assert torch.__version__ in missing.why


def test_nothing_imports_torch_to_know_the_gpu() -> None:
    code = (
        "import sys; from upvits.deploy.machine import doctor, gpu; gpu.current_gpu(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert torch.__version__
