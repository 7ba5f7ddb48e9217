"""Models that ONNX Runtime runs: sessions on an execution provider.

The only file that imports onnxruntime.
"""

import functools
import importlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from onnx import ModelProto

from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.deploy.machine.cuda_libraries import cuda_pieces, missing_cuda
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.machine.gpu import current_gpu, release_cached_memory
from upvits.deploy.runtimes import onnxruntime_providers as providers
from upvits.deploy.runtimes.interface import Arrays, CallTimes, LayerTime
from upvits.deploy.runtimes.nvinfer import is_out_of_memory
from upvits.deploy.runtimes.onnxruntime_binding import Binding
from upvits.deploy.runtimes.onnxruntime_facts import layer_times_of, load_optimised
from upvits.deploy.store.drafts import scratch_folder

LESS_MEMORY = "Use smaller batches or fewer streams (--streams), or free memory of the device."
_FATAL, _WARNING = 4, 2  # severities of ONNX Runtime's logger
_HEAVY = frozenset({"Attention", "Conv", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Softmax"})
_LONGEST_CALL = 45.0  # seconds of a call that is not timed; a Loop in a graph need not end
_Array = np.ndarray[Any, np.dtype[Any]]


class OnnxRuntimeSession:
    """An ONNX model on an execution provider: that which was asked for or an error, never a silent fallback."""

    def __init__(
        self,
        model: bytes | Path,
        provider: str = providers.CPU,
        *,
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
        cuda_graph: bool = False,
    ) -> None:
        threads = threads or usable_cores()
        self._model, self._provider, self._threads = model, provider, threads
        self._gpu = current_gpu()
        if provider != providers.CPU:
            release_cached_memory()
        self._provider_options = {**providers.device_settings(provider, self._gpu), **(provider_options or {})}
        self._cuda_graph = cuda_graph
        self._bindings: dict[tuple[tuple[int, ...], ...], Binding] = {}
        options = _session_options(threads)
        if provider != providers.CPU:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._session: Any = _create(model, options, provider, self._provider_options)
        if provider not in self._session.get_providers():
            why, fix = missing_libraries() or (
                f"It fell back to {', '.join(self._session.get_providers())}.",
                "See `upvits-deploy doctor`, or run on the CPU.",
            )
            raise MissingDependencyError(f"ONNX Runtime's {provider} does not work on this machine", why=why, fix=fix)
        self.input_names: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(value.name for value in self._session.get_outputs())
        self.on_gpu = on_gpu = provider != providers.CPU
        self.settings: dict[str, str | int | bool] = {
            "provider": provider,
            "intra_op_threads": threads,
            "spinning": False,
            **({"cuda_graph": cuda_graph, "first_run_ms": 0} if on_gpu else {}),
        }

    def run(self, feeds: Arrays) -> dict[str, _Array]:
        if self._session is None:
            raise ValueError("the session is closed")
        with _run_errors(self._provider):
            return self._run(feeds)

    def _run(self, feeds: Arrays) -> dict[str, _Array]:
        if not self._cuda_graph:
            with _ending(_library().RunOptions()) as options:
                values = self._session.run(self.output_names, dict(feeds), options)
            return dict(zip(self.output_names, values, strict=True))
        return self._bound(feeds).call(feeds)  # a recorded graph reads and writes the same addresses each time

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        if self._session is None:
            raise ValueError("the session is closed")
        with _run_errors(self._provider):
            return self._bound(feeds).time(feeds, calls)

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[LayerTime, ...]:
        """Empty on GPUs, where the profiler sees how long a kernel takes to be submitted, not to run."""
        if self._session is None:
            raise ValueError("the session is closed")
        if self._provider != providers.CPU:
            return ()
        with scratch_folder() as folder:
            # A second session: profiling is switched on for good, and the first is to stay as fast as it is.
            with OnnxRuntimeSession(self._model, threads=self._threads) as warm:
                warm.run(feeds)
            options = _session_options(self._threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / "trace")
            profiled = _create(self._model, options, self._provider, {})
            with _run_errors(self._provider):
                for _ in range(calls + 1):  # medians leave the first call, which warms up, without weight
                    profiled.run(self.output_names, dict(feeds))
            return layer_times_of(Path(profiled.end_profiling()))

    def left_to_cpu(self) -> tuple[str, ...]:
        """Nodes with real work that a GPU's provider did not take, as "name (operator)"."""
        if self._provider == providers.CPU or not hasattr(self._session, "get_provider_graph_assignment_info"):
            return ()
        parts = self._session.get_provider_graph_assignment_info()
        nodes = [node for part in parts if part.ep_name == providers.CPU for node in part.get_nodes()]
        return tuple(f"{node.name} ({node.op_type})" for node in nodes if node.op_type in _HEAVY)

    def close(self) -> None:
        self._session = None
        self._bindings.clear()

    def __enter__(self) -> "OnnxRuntimeSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bound(self, feeds: Arrays) -> Binding:
        """Static buffers for these shapes, made once."""
        arrays = {name: np.asarray(feeds[name]) for name in self.input_names}
        key = tuple(array.shape for array in arrays.values())
        if key not in self._bindings:
            options, later = _library().RunOptions(), None
            if self._cuda_graph:  # the first call finds the outputs' shapes: nothing is recorded of it
                options.add_run_config_entry("gpu_graph_id", "-1")
                later = _library().RunOptions()
                later.add_run_config_entry("gpu_graph_id", str(len(self._bindings) + 1))

            def first(binding: Any) -> None:
                with _ending(options):
                    self._session.run_with_iobinding(binding, options)

            def run(binding: Any) -> None:
                self._session.run_with_iobinding(binding, later)

            on_cpu = self._provider == providers.CPU
            device = ("cpu", 0) if on_cpu else ("cuda", self._gpu)
            bound = Binding(self._session, arrays, self.output_names, device, first=first, run=run)
            if not on_cpu:
                self.settings["first_run_ms"] = max(bound.first_run_ms, int(self.settings["first_run_ms"]))
            self._bindings[key] = bound
        return self._bindings[key]


def optimised_graph(
    model: bytes | Path, provider: str = providers.CPU, provider_options: Mapping[str, str] | None = None
) -> ModelProto:
    """The graph as ONNX Runtime runs it on this machine, without its large weights."""
    with scratch_folder() as folder:
        path = folder / "optimised.onnx"
        options = _session_options(1)
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        _create(
            model, options, provider, {**providers.device_settings(provider, current_gpu()), **(provider_options or {})}
        )
        return load_optimised(path)


def _library() -> Any:
    """The library. Since 1.31 it reports its use to its maker, also on Linux; here it only does when told to."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def library_version() -> str:
    onnxruntime = _library()

    return str(onnxruntime.__version__)


def library_folder() -> Path:
    onnxruntime = _library()

    return Path(onnxruntime.__file__).parent


def available_providers() -> tuple[str, ...]:
    """Providers that this build of the library has, whether they work here or not."""
    onnxruntime = _library()

    return tuple(onnxruntime.get_available_providers())


def preload_cuda() -> None:
    """Load the CUDA libraries that came with pip, where the library knows how (1.21 and later).

    What it prints about those that are not there is told by `missing_libraries`, and concerns nobody without a GPU.
    """
    onnxruntime = _library()

    with _quiet_library(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()


def missing_libraries() -> tuple[str, str] | None:
    """Why the CUDA libraries of the GPU providers do not load here, and what mends it; None when all do."""
    preload_cuda()
    return missing_cuda(_cuda_provider(), library_version())


def cuda_state() -> dict[str, Any]:
    """What `doctor` shows, as plain JSON values: the libraries that are needed, and what is wrong, if anything is."""
    preload_cuda()
    pieces = [asdict(piece) for piece in cuda_pieces(_cuda_provider())]
    return {"pieces": pieces, "missing": missing_cuda(_cuda_provider(), library_version())}


def _cuda_provider() -> Path:
    return library_folder() / "capi" / "libonnxruntime_providers_cuda.so"


def _session_options(threads: int) -> Any:
    onnxruntime = _library()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _FATAL
    # Spinning threads fight for cores with whatever else runs, a second session of the same process included.
    # PVTv2-B0 dense and half as wide in turns, 64 pixels, batch 8, on 2 cores beside a busy process: 58 and
    # 32 ms with spinning, 27 and 14 ms without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _create(model: bytes | Path, options: Any, provider: str, provider_options: Mapping[str, str]) -> Any:
    """A session of the library, with nothing printed about it."""
    onnxruntime = _library()

    source = str(model) if isinstance(model, Path) else model
    with _quiet_library():
        if provider == providers.TENSORRT_RTX and provider not in onnxruntime.get_available_providers():
            devices = _rtx_devices()
            number = int(provider_options.get("device_id", 0))
            if number >= len(devices):
                raise RuntimeError(
                    f"the TensorRT-RTX plugin sees {len(devices)} GPUs that it can use, not number {number}"
                )
            named = {name: value for name, value in provider_options.items() if name != "device_id"}
            options.add_provider_for_devices([devices[number]], named)
            return onnxruntime.InferenceSession(source, options)
        chosen = [(provider, dict(provider_options))]
        return onnxruntime.InferenceSession(source, options, providers=chosen, enable_fallback=0)


@functools.cache
def _rtx_devices() -> list[Any]:
    """GPUs of the TensorRT-RTX plugin, which registers itself with the library once."""
    onnxruntime = _library()

    plugin = importlib.import_module(providers.RTX_PLUGIN)
    onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == plugin.get_ep_name()]


@contextmanager
def _quiet_library() -> Iterator[None]:
    """A provider that fails to load writes to stderr from C++; what matters of it is raised from here."""
    onnxruntime = _library()

    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def load_errors() -> tuple[type[Exception], ...]:
    """Everything that creating a session raises for a model that it cannot take."""
    state = _library().capi.onnxruntime_pybind11_state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.RuntimeException,
        # a provider that does not load
        RuntimeError,
        ValueError,
    )


def reason(error: Exception) -> str:
    """The library's message without its code prefix."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()


def memory_ran_out(why: str) -> bool:
    """Whether a message of the library speaks of memory that ran out; its arena has other words for it."""
    return is_out_of_memory(why) or re.search(r"(?i)failed to allocate memory|bad[_ ]alloc", why) is not None


@contextmanager
def _ending(options: Any) -> Iterator[Any]:
    """Options of a call that the library gives up after `_LONGEST_CALL`."""
    timer = threading.Timer(_LONGEST_CALL, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()


@contextmanager
def _run_errors(provider: str) -> Iterator[None]:
    """Turn what a call can fail with into messages."""
    try:
        yield
    except load_errors() + (MemoryError,) as error:  # noqa: RUF005
        why = reason(error)
        ran_out = isinstance(error, MemoryError) or memory_ran_out(why)
        if "terminate flag" in why:
            why = f"A call did not end within {_LONGEST_CALL:.0f} s."
        raise UserError(
            f"ONNX Runtime's {provider} cannot run this model on these inputs",
            why=why,
            fix=LESS_MEMORY if ran_out else "Check sizes and values of the inputs against the model.",
        ) from error
