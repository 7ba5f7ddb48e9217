"""ONNX Runtime on the CPU, and on NVIDIA GPUs when its CUDA provider really works.

The only file that runs models with onnxruntime. (The trailing underscore keeps the module's name apart from the
library's.)
"""

import functools
import importlib.util
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx

from calib_data.errors import MissingDependencyError, UserError
from deploy.environment import usable_cores
from deploy.graph import load_model
from deploy.precision import PRECISIONS, convert
from deploy.runtimes.cuda import missing_gpu
from deploy.runtimes.engine_folder import build_failed, check_request, read_engine, require, save_engine
from deploy.runtimes.interface import Arrays, BuildOptions, Engine, Missing

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TUNING_SECONDS = 3.0
_WORTHWHILE = 0.7  # parallel efficiency
_FATAL, _WARNING = 4, 2  # severities of ONNX Runtime's logger


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """ONNX Runtime with one execution provider. The engine is the ONNX file itself, in the precision asked for."""

    name: str
    provider: str
    precisions: tuple[str, ...] = PRECISIONS

    def missing_to_build(self) -> Missing | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return Missing("onnxruntime is not installed.", "pip install onnxruntime-gpu")
        return _missing_cuda() if self.provider == _CUDA else None

    def missing_to_run(self) -> Missing | None:
        return self.missing_to_build()

    def build(self, onnx_path: Path, folder: Path, options: BuildOptions) -> Engine:
        model = check_request(self, onnx_path, folder, options)
        if options.targets:
            raise UserError(f"{self.name} builds for no particular device", fix="Leave the targets out for it.")
        import onnxruntime

        started = time.perf_counter()
        converted = convert(model, options.precision)
        content = converted.SerializeToString()
        settings: dict[str, str | int | bool] = {"provider": self.provider}
        try:
            OnnxRuntimeSession(content, self.provider).close()
            if self.provider == _CPU:
                settings["intra_op_threads"] = worthwhile_threads(content, options.batch.opt)
        except _load_errors() as error:
            raise build_failed(self, onnx_path, converted, _reason(error)) from error
        return save_engine(
            self,
            folder,
            "model.onnx",
            content,
            options=options,
            targets=(),
            seconds=time.perf_counter() - started,
            library="onnxruntime",
            library_version=onnxruntime.__version__,
            onnx_path=onnx_path,
            settings=settings,
        )

    def open(self, folder: Path) -> "OnnxRuntimeSession":
        engine = read_engine(folder, self.name)
        require(self.missing_to_run(), f"{self.name} cannot run here")
        try:
            threads = int(engine.settings.get("intra_op_threads", 0)) or None
            return OnnxRuntimeSession(engine.path.read_bytes(), self.provider, threads=threads)
        except _load_errors() as error:
            raise UserError(f"{self.name} cannot open {engine.path}", why=_reason(error)) from error


class OnnxRuntimeSession:
    """An ONNX model on one execution provider: the one asked for or an error, never a silent fallback."""

    def __init__(self, model: bytes, provider: str = _CPU, *, threads: int | None = None) -> None:
        import onnxruntime

        threads = threads or usable_cores()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _FATAL
        # Spinning threads fight for cores with whatever else runs, a second session of the same process included.
        # PVTv2-B0 dense and half as wide in turns, 64 pixels, batch 8, on 2 cores beside one busy process: 58 and
        # 32 ms with spinning, 27 and 14 ms without.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with _quiet_library():
            self._session: Any = onnxruntime.InferenceSession(model, options, providers=[_with_options(provider)])
        if provider not in self._session.get_providers():
            raise MissingDependencyError(
                f"ONNX Runtime's {provider} does not work on this machine",
                why=f"It fell back to {', '.join(self._session.get_providers())}.",
                fix="Install the CUDA and cuDNN versions that this onnxruntime-gpu was built for, or run on the CPU.",
            )
        self.input_names: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(value.name for value in self._session.get_outputs())
        self.settings: Mapping[str, str | int | bool] = {
            "provider": provider,
            "intra_op_threads": threads,
            "spinning": False,
        }

    def random_feeds(self, batch: int) -> Arrays | None:
        """Random inputs for one call; None when an axis other than the first is dynamic."""
        feeds = {}
        generator = np.random.default_rng(0)
        for value in self._session.get_inputs():
            sizes = value.shape[1:]
            if not all(isinstance(size, int) for size in sizes):
                return None
            noise = generator.random((batch, *sizes), np.float32)
            feeds[value.name] = (255 * noise).astype(np.uint8) if value.type == "tensor(uint8)" else noise
        return feeds

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        if self._session is None:
            raise ValueError("the session is closed")
        return dict(zip(self.output_names, self._session.run(self.output_names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._session = None

    def __enter__(self) -> "OnnxRuntimeSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_options(provider: str) -> str | tuple[str, dict[str, str]]:
    # fp32 means fp32: CUDA would otherwise multiply in TF32
    return (provider, {"use_tf32": "0"}) if provider == _CUDA else provider


def worthwhile_threads(model: bytes, batch: int) -> int:
    """How many threads are worth their cores for a model on this CPU: one, half of the cores or all, timed in turns.

    More threads are taken only where each of them still does at least 70 % of what it could: narrow layers are over
    before another thread has woken up, and two of a virtual machine's cores may be one real core. PVTv2-B0 at 64
    pixels, batch 8, on such a machine: 19.2 ms with one thread and 15.4 with two, but half as wide 8.9 and 9.1. Cores
    that are not worth it serve more by running a second session; and timings on one thread spread less.
    """
    cores = usable_cores()
    sessions = {count: OnnxRuntimeSession(model, threads=count) for count in sorted({1, max(1, cores // 2), cores})}
    feeds = sessions[1].random_feeds(batch)
    if len(sessions) == 1 or feeds is None:
        return cores
    times: dict[int, list[float]] = {count: [] for count in sessions}
    started = time.perf_counter()
    while len(times[1]) < 4 or (len(times[1]) < 60 and time.perf_counter() - started < _TUNING_SECONDS):
        for count, session in sessions.items():
            called = time.perf_counter()
            session.run(feeds)
            times[count].append(time.perf_counter() - called)
    medians = {count: float(np.median(own[1:])) for count, own in times.items()}  # the first call warms up
    best = 1
    for count in medians:
        if medians[best] / medians[count] >= _WORTHWHILE * count / best:
            best = count
    return best


def open_onnx(path: Path, *, threads: int | None = None) -> OnnxRuntimeSession:
    """Run any ONNX file on the CPU, as parity checks do.

    Args:
        path: the file.
        threads: threads inside operators; default: the cores that this process may use.

    Raises:
        UserError: ONNX Runtime cannot load the file.
        MissingDependencyError: onnxruntime is not installed.
    """
    require(CPU.missing_to_run(), "ONNX files cannot be run here")
    try:
        return OnnxRuntimeSession(load_model(path).SerializeToString(), threads=threads)
    except _load_errors() as error:
        raise UserError(f"ONNX Runtime cannot load {path}", why=_reason(error)) from error


CPU = OnnxRuntime("onnxruntime", _CPU)
CUDA = OnnxRuntime("onnxruntime-cuda", _CUDA)


@functools.cache
def _missing_cuda() -> Missing | None:
    """What the CUDA provider lacks. `get_available_providers` lists it on machines without a GPU too, so try it."""
    import onnxruntime

    if _CUDA not in onnxruntime.get_available_providers():
        fix = "pip uninstall onnxruntime; pip install onnxruntime-gpu"
        return Missing("This build of onnxruntime has no CUDA provider.", fix)
    if (missing := missing_gpu()) is not None:
        return missing
    with _quiet_library():
        if hasattr(onnxruntime, "preload_dlls"):  # 1.21 and later: finds the CUDA libraries that came with torch
            onnxruntime.preload_dlls()
    shape = [1]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "probe",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
    )
    probe = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    try:
        OnnxRuntimeSession(probe.SerializeToString(), _CUDA).close()
    except MissingDependencyError as error:
        return Missing(error.why, error.fix)
    return None


@contextmanager
def _quiet_library() -> Iterator[None]:
    """A provider that fails to load writes to stderr from C++; what matters of it is raised from here."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def _load_errors() -> tuple[type[Exception], ...]:
    """Everything that creating a session raises for a model that it cannot take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.RuntimeException,
    )


def _reason(error: Exception) -> str:
    """The library's message without its code prefix."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
