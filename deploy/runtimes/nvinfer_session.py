"""Running engines of TensorRT and TensorRT-RTX. Buffers are torch tensors, so no further CUDA binding is needed.

Inputs and outputs live in buffers that are bound once per shape: pinned memory on the host, and memory on the GPU. A
call is a copy in, the engine (or the replay of a CUDA graph of it), and a copy out, all on the same stream.

TensorRT-RTX compiles the kernels of a shape on the machine that runs it (`rtx_kernels.py`), at the first call with that
shape; what this took is a figure of its own, `first_run_ms` in the settings of the session.
"""

import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from upvits.calib_data.errors import UserError
from upvits.deploy.machine.gpu import current_gpu, release_cached_memory
from upvits.deploy.runtimes.buffers import LESS_MEMORY, Buffer, new_buffer
from upvits.deploy.runtimes.inspector import read_inspector
from upvits.deploy.runtimes.interface import DEFAULT_RUN, Arrays, CallTimes, Engine, LayerTime, RunOptions
from upvits.deploy.runtimes.kernels import Kernel
from upvits.deploy.runtimes.nvinfer import check_device, is_out_of_memory, messages
from upvits.deploy.runtimes.rtx_kernels import RtxKernels, has_rtx_kernels

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Bound:
    """Buffers that an execution context is bound to, and the CUDA graph of a call with them."""

    shapes: dict[str, tuple[int, ...]]
    inputs: dict[str, Buffer]
    outputs: dict[str, Buffer]
    graph: Any | None


class NvinferSession:
    """An engine on the GPU that was the current one when it was opened, whichever thread runs it."""

    on_gpu = True

    def __init__(self, trt: Any, engine: Engine, options: RunOptions = DEFAULT_RUN) -> None:
        check_device(engine)
        self._trt = trt
        self._log = messages(trt)
        self._log.clear()
        self._gpu = current_gpu()
        release_cached_memory()
        self._library: Any = trt.Runtime(self._log)
        self._cuda_engine: Any = self._library.deserialize_cuda_engine(engine.path.read_bytes())
        if self._cuda_engine is None:
            raise self._failure(engine, "open", "Build the engine again on this machine with `upvits-deploy engine`.")
        for warning in dict.fromkeys(self._log.warnings):  # such as that it was built on another model of GPU
            _LOG.warning("%s says of %s: %s", engine.runtime, engine.path, warning.strip())
        self._rtx: RtxKernels | None = None
        if has_rtx_kernels(trt):
            self._rtx = RtxKernels(trt, self._cuda_engine, engine, cuda_graph=options.cuda_graph)
        self._context: Any = self._new_context()
        if self._context is None:
            raise self._failure(engine, "run", LESS_MEMORY)
        names = [self._cuda_engine.get_tensor_name(index) for index in range(self._cuda_engine.num_io_tensors)]
        inputs = {name for name in names if self._cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.input_names: tuple[str, ...] = tuple(name for name in names if name in inputs)
        self.output_names: tuple[str, ...] = tuple(name for name in names if name not in inputs)
        self.settings: dict[str, str | int | bool] = {
            "device": torch.cuda.get_device_name(self._gpu),
            "cuda_graph": options.cuda_graph,
            "first_run_ms": 0,
        }
        self._dtypes = {name: np.dtype(trt.nptype(self._cuda_engine.get_tensor_dtype(name))) for name in names}
        self._engine = engine
        self._stream = torch.cuda.Stream(self._gpu)  # type: ignore[no-untyped-call]
        self._bound: _Bound | None = None

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        with torch.cuda.stream(self._stream):
            bound = self._prepare(feeds)
            self._copy_in(bound)
            self._launch(bound)
            self._copy_out(bound)
            self._stream.synchronize()
        return {name: buffer.host.numpy().copy() for name, buffer in bound.outputs.items()}

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        """Time calls: the stages by events on the GPU, which are read after the last call; the whole by the host."""
        total, enqueue = np.empty(calls), np.empty(calls)
        marks = [[_event() for _ in range(4)] for _ in range(calls)]
        with torch.cuda.stream(self._stream):
            bound = self._prepare(feeds)
            self._stream.synchronize()
            for index, (start, copied, computed, end) in enumerate(marks):
                called = time.perf_counter()
                start.record(self._stream)
                self._copy_in(bound)
                copied.record(self._stream)
                submitted = time.perf_counter()
                self._launch(bound)
                enqueue[index] = time.perf_counter() - submitted
                computed.record(self._stream)
                self._copy_out(bound)
                end.record(self._stream)
                self._stream.synchronize()
                total[index] = time.perf_counter() - called
        # elapsed_time is in milliseconds
        h2d, compute, d2h = (
            np.array([events[stage].elapsed_time(events[stage + 1]) for events in marks]) / 1e3 for stage in range(3)
        )
        return CallTimes(total=total, h2d=h2d, compute=compute, d2h=d2h, enqueue=enqueue)

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[LayerTime, ...]:
        """Times of layers, from a separate context: a profiler slows calls down and forbids CUDA graphs."""
        if not hasattr(self._trt, "IProfiler") or calls < 1:
            return ()
        context = self._new_context()
        if context is None:
            raise self._failure(self._engine, "profile", LESS_MEMORY)
        profiler = _profiler(self._trt)
        with torch.cuda.stream(self._stream):
            bound = self._bind(context, feeds)
            self._copy_in(bound)
            self._execute(context)  # the first call makes what later ones reuse
            self._stream.synchronize()
            context.profiler = profiler
            for _ in range(calls):
                self._execute(context)
                self._stream.synchronize()
        kernels = self._kernels(context)
        return tuple(_layer_time(name, times, kernels.get(name)) for name, times in profiler.ms.items())

    def runtime_cache(self) -> bytes:
        """The kernels that TensorRT-RTX compiled so far, for `RUNTIME_CACHE`; nothing for TensorRT."""
        return b"" if self._rtx is None else self._rtx.compiled()

    def close(self) -> None:
        if self._rtx is not None and self._context is not None:
            self._rtx.keep()
        self._bound = None
        self._context = self._rtx = self._cuda_engine = self._library = None

    def __enter__(self) -> "NvinferSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, feeds: Arrays) -> _Bound:
        """Buffers for these inputs, filled on the host; those of the last call where the shapes are the same."""
        if self._context is None:
            raise ValueError("the session is closed")
        shapes = {name: tuple(feeds[name].shape) for name in self.input_names}
        if self._bound is None or self._bound.shapes != shapes:
            self._bound = None  # gives its memory back first
            bound = self._bind(self._context, feeds)
            self._first_run(bound)
            by_hand = self.settings["cuda_graph"] and self._rtx is None
            self._bound = _Bound(shapes, bound.inputs, bound.outputs, self._captured() if by_hand else None)
        for name, buffer in self._bound.inputs.items():
            buffer.fill(feeds[name])
        return self._bound

    def _bind(self, context: Any, feeds: Arrays) -> _Bound:
        """Bind a context to new buffers for these inputs.

        Raises:
            UserError: a shape is outside the engine's profile, or GPU memory ran out.
        """
        shapes = {name: tuple(feeds[name].shape) for name in self.input_names}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                batch = self._engine.batch
                raise UserError(
                    f"the engine does not take {name} of shape {shape}",
                    why=f"It was built for batches of {batch.min} to {batch.max}.",
                    fix="Feed such a batch, or build an engine with another batch profile.",
                )
        inputs = {name: self._buffer(context, name, shape) for name, shape in shapes.items()}
        shapes_out = {name: tuple(context.get_tensor_shape(name)) for name in self.output_names}
        outputs = {name: self._buffer(context, name, shape) for name, shape in shapes_out.items()}
        for name, buffer in inputs.items():
            buffer.fill(feeds[name])
        return _Bound(shapes, inputs, outputs, None)

    def _buffer(self, context: Any, name: str, shape: tuple[int, ...]) -> Buffer:
        if any(size < 0 for size in shape):
            raise UserError(
                f"the shape of {name} depends on the data",
                why="Its buffer cannot be made before the call.",
                fix="Export the model with outputs of fixed size.",
            )
        buffer = new_buffer(shape, self._dtypes[name], f"cuda:{self._gpu}")
        context.set_tensor_address(name, buffer.device.data_ptr())
        return buffer

    def _first_run(self, bound: _Bound) -> None:
        """The first call with these shapes: it sets up what later ones reuse, and compiles kernels in TensorRT-RTX."""
        self._copy_in(bound)
        self._stream.synchronize()
        started = time.perf_counter()
        self._execute(self._context)
        self._stream.synchronize()
        took = round(1e3 * (time.perf_counter() - started))
        self.settings["first_run_ms"] = max(took, int(self.settings["first_run_ms"]))
        if self._rtx is not None and not self._rtx.can_record(self._context, self._stream.cuda_stream):
            _LOG.warning("%s runs without a CUDA graph: its library says that none can be recorded", self._engine.path)

    def _captured(self) -> Any:
        """A CUDA graph of a call. Copies stay outside, so that they can be timed apart."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._execute(self._context)
        except (RuntimeError, UserError) as error:
            raise UserError(
                f"{self._engine.path} cannot be recorded as a CUDA graph",
                why=str(error).splitlines()[0],
                fix="Run it without CUDA graphs.",
            ) from error
        return graph

    def _new_context(self) -> Any:
        """An execution context; None where the library has no memory for one."""
        if self._rtx is not None:
            return self._rtx.new_context()
        return self._cuda_engine.create_execution_context()

    def _copy_in(self, bound: _Bound) -> None:
        for buffer in bound.inputs.values():
            buffer.device.copy_(buffer.host, non_blocking=True)

    def _copy_out(self, bound: _Bound) -> None:
        for buffer in bound.outputs.values():
            buffer.host.copy_(buffer.device, non_blocking=True)

    def _launch(self, bound: _Bound) -> None:
        if bound.graph is not None:
            bound.graph.replay()
        else:
            self._execute(self._context)

    def _execute(self, context: Any) -> None:
        self._log.errors.clear()
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise self._failure(self._engine, "run", "Build the engine again, or report this with the message above.")

    def _kernels(self, context: Any) -> dict[str, Kernel]:
        inspector = self._cuda_engine.create_engine_inspector()
        inspector.execution_context = context  # fills in the shapes of this call
        compiled = read_inspector(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return {kernel.name: kernel for kernel in compiled.kernels} if compiled is not None else {}

    def _failure(self, engine: Engine, what: str, fix: str) -> UserError:
        why = "\n".join(self._log.errors[-2:]) or "The library gave no reason."
        return UserError(
            f"{engine.runtime} cannot {what} {engine.path}",
            why=why,
            fix=LESS_MEMORY if is_out_of_memory(why) else fix,
        )


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _layer_time(name: str, times: list[float], kernel: Kernel | None) -> LayerTime:
    ms = float(np.median(times))
    if kernel is None:
        return LayerTime(name, "other", ms)
    return LayerTime(", ".join(kernel.nodes) or name, kernel.op, ms, kernel.precision, kernel.bytes)


def _profiler(trt: Any) -> Any:
    """Collects milliseconds by layer; the class can only be made once the library is imported."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.ms: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms.setdefault(layer_name, []).append(ms)

    return Profiler()
