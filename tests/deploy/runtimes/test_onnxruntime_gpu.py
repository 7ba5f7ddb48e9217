"""ONNX Runtime on GPUs, with its own CPU provider in the place of the GPU's: what is passed, bound, kept and timed."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.deploy.conftest import Exported
from upvits.calib_data.errors import UserError
from upvits.deploy.runtimes import BatchProfile, BuildOptions, RunOptions, onnxruntime_, onnxruntime_binding
from upvits.deploy.runtimes import onnxruntime_providers as providers
from upvits.deploy.runtimes import onnxruntime_session as sessions
from upvits.deploy.runtimes.buffers import Buffer, new_buffer
from upvits.deploy.runtimes.onnxruntime_ import CUDA, TENSORRT, TENSORRT_RTX
from upvits.deploy.runtimes.onnxruntime_session import OnnxRuntimeSession

OPTIONS = BuildOptions("fp32", BatchProfile(1, 2, 4))


class OnCpu:
    """A session of the library that does on the CPU what it is asked to do on a GPU."""

    def __init__(self, session: Any, provider: str, bound: list[tuple[str, int]]) -> None:
        self._session, self._provider, self._bound = session, provider, bound

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [self._provider]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return []

    def io_binding(self) -> Any:
        binding, seen = self._session.io_binding(), self._bound

        class Binding:
            def __getattr__(self, name: str) -> Any:
                return getattr(binding, name)

            def bind_input(self, name: str, kind: str, number: int, *memory: Any) -> None:
                seen.append((kind, number))
                binding.bind_input(name, "cpu", 0, *memory)

            def bind_output(self, name: str, kind: str, number: int, *memory: Any) -> None:
                seen.append((kind, number))
                binding.bind_output(name, "cpu", 0, *memory)

            @property
            def _iobinding(self) -> Any:
                return binding._iobinding

        return Binding()


Opened = list[tuple[Any, str, dict[str, str]]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Opened, list[tuple[str, int]]]:
    """The third GPU of a machine; every session that is made on it, and where its buffers were bound."""
    opened: Opened = []
    bound: list[tuple[str, int]] = []
    create = sessions._create

    def on_cpu(model: Any, options: Any, provider: str, provider_options: dict[str, str]) -> Any:
        opened.append((model, provider, dict(provider_options)))
        session = create(model, options, providers.CPU, {})
        compiled_by_tensorrt(model, provider_options)
        return OnCpu(session, provider, bound)

    def buffer(shape: tuple[int, ...], dtype: Any, device: str) -> Buffer:
        assert device == "cuda:2"
        other = new_buffer(shape, dtype, "cpu")
        return Buffer(new_buffer(shape, dtype, "cpu").host, other.device)

    monkeypatch.setenv("UPVITS_DEPLOY_CACHE", str(tmp_path / "user's cache"))
    monkeypatch.setattr(sessions, "_create", on_cpu)
    monkeypatch.setattr(sessions, "current_gpu", lambda: 2)
    monkeypatch.setattr(onnxruntime_binding, "new_buffer", buffer)
    monkeypatch.setattr(onnxruntime_, "_missing_provider", lambda provider: None)
    monkeypatch.setattr(onnxruntime_, "missing_to_run_on_gpu", lambda: None)
    return opened, bound


def compiled_by_tensorrt(model: Any, options: dict[str, str]) -> None:
    """Keep an engine as the TensorRT provider does: found again by the hash of the model's file name, and of nothing
    that says where the file lies (`TRTGenerateId` of ONNX Runtime); a model in memory has no such name."""
    if options.get("trt_engine_cache_enable") == "1":
        named = Path(model).name.encode() if isinstance(model, Path) else b"a model in memory"
        folder = Path(options["trt_engine_cache_path"])
        name = f"TRTKernel_{hashlib.sha256(named).hexdigest()[:8]}_{options['device_id']}_sm89.engine"
        (folder / name).touch()


def test_a_session_runs_on_the_gpu_that_is_the_current_one(vit: Exported, gpu: Any) -> None:
    opened, bound = gpu
    images = vit.images.numpy()[:2]
    with OnnxRuntimeSession(vit.report.path, providers.CUDA, threads=1) as session:
        wanted = session.run({"images": images})["logits"]
        times = session.time({"images": images}, 5)
    assert [(provider, given["device_id"]) for _, provider, given in opened] == [(providers.CUDA, "2")]
    assert set(bound) == {("cuda", 2)}
    assert wanted.shape == (2, 7)
    parts = (times.h2d, times.compute, times.d2h)
    assert all(part is not None and part.shape == (5,) and (part > 0).all() for part in parts)
    np.testing.assert_allclose(times.total, sum(part for part in parts if part is not None))
    assert int(session.settings["first_run_ms"]) >= 0


def test_calls_with_a_cuda_graph_read_and_write_the_same_buffers(vit: Exported, gpu: Any) -> None:
    _, bound = gpu
    images = vit.images.numpy()
    with OnnxRuntimeSession(vit.report.path, threads=1) as plain:
        wanted = plain.run({"images": images})["logits"]
    with OnnxRuntimeSession(vit.report.path, providers.CUDA, threads=1, cuda_graph=True) as session:
        first = session.run({"images": images[:2]})["logits"]
        places = len(bound)
        second = session.run({"images": images[2:4]})["logits"]
        assert len(bound) == places
        session.time({"images": images[:2]}, 2)
        assert len(bound) == places
    np.testing.assert_allclose(np.concatenate([first, second]), wanted[:4], atol=1e-5)  # the first were copied out


def test_an_engine_that_is_opened_is_the_one_that_was_built(
    vit: Exported, gpu: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened, _ = gpu
    folder = tmp_path / "engine"
    engine = TENSORRT.build(vit.report.path, folder, OPTIONS)
    built = {path.name for path in (folder / "cache").iterdir()}
    TENSORRT.open(folder).close()
    assert {path.name for path in (folder / "cache").iterdir()} == built
    assert "compiled again" not in caplog.text
    (first, _, of_build), (second, _, of_open) = opened
    assert Path(first).name == Path(second).name == engine.file
    differing = {"trt_engine_cache_path"}
    assert {k: v for k, v in of_build.items() if k not in differing} == {
        k: v for k, v in of_open.items() if k not in differing
    }


def test_an_engine_that_is_compiled_again_is_told(
    vit: Exported, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    TENSORRT.build(vit.report.path, tmp_path / "engine", OPTIONS)
    monkeypatch.setattr(sessions, "current_gpu", lambda: 1)
    TENSORRT.open(tmp_path / "engine").close()
    assert "was compiled again instead of being opened" in caplog.text


def test_kernels_of_rtx_are_kept_in_the_user_s_cache(vit: Exported, gpu: Any, tmp_path: Path) -> None:
    opened, _ = gpu
    folder = tmp_path / "engine"
    engine = TENSORRT_RTX.build(vit.report.path, folder, OPTIONS)
    (folder / "cache").mkdir()
    (folder / "cache" / "kernels").write_text("of the build")
    for content in ("of the build", "of a later run"):
        TENSORRT_RTX.open(folder, RunOptions(cuda_graph=True)).close()
        given = opened[-1][2]
        kept = Path(given["nv_runtime_cache_path"])
        assert kept == tmp_path / "user's cache" / "rtx" / engine.sha256
        assert given["enable_cuda_graph"] == "1"
        assert (kept / "kernels").read_text() == content
        (kept / "kernels").write_text("of a later run")
    assert (folder / "cache" / "kernels").read_text() == "of the build"  # an artifact stays as it was made
    assert opened[0][2]["nv_runtime_cache_path"] != given["nv_runtime_cache_path"]


def test_memory_of_the_gpu_that_runs_out_says_what_helps(vit: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match="GPU memory ran out") as refusal:
        new_buffer((1, 3), np.dtype(np.float32), "cuda:0")
    assert "fewer streams" in refusal.value.fix


@pytest.mark.parametrize("runtime", [CUDA, TENSORRT, TENSORRT_RTX])
def test_what_pytorch_holds_and_does_not_use_is_given_back_before_a_session(
    runtime: onnxruntime_.OnnxRuntime, vit: Exported, gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("emptied"))
    create: Callable[..., Any] = sessions._create

    def made(*arguments: Any) -> Any:
        happened.append("made")
        return create(*arguments)

    monkeypatch.setattr(sessions, "_create", made)
    OnnxRuntimeSession(onnx.load(vit.report.path).SerializeToString(), runtime.provider, threads=1).close()
    assert happened == ["emptied", "made"]
