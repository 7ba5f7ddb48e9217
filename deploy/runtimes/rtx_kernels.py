"""The kernels that TensorRT-RTX compiles on the machine that runs an engine, and where they are kept.

An engine holds kernels for any batch of its profile. For the batch that is fed, faster ones are compiled: by default in
the background while slow ones run, so that a measurement would be one of both, and a CUDA graph recorded by hand would
hold the slow ones for good. Here they are compiled before the first call with a shape is over ("eager"), and the
library records CUDA graphs itself. What was compiled is kept, since it takes seconds: beside an engine that was built
on a machine with such a GPU, and in the user's cache folder.
"""

import contextlib
from pathlib import Path
from typing import Any

from upvits.calib_data.cache import cache_folder
from upvits.calib_data.errors import UserError
from upvits.deploy.runtimes.interface import Engine
from upvits.deploy.store.artifacts import atomic_write

RUNTIME_CACHE = "runtime.cache"  # file in an engine folder


def has_rtx_kernels(trt: Any) -> bool:
    """Whether a library compiles kernels when it runs: TensorRT-RTX does, TensorRT does not."""
    return hasattr(trt, "DynamicShapesKernelSpecializationStrategy")


class RtxKernels:
    """What execution contexts of an engine are made with: how to compile, how to record, and what is compiled."""

    def __init__(self, trt: Any, cuda_engine: Any, engine: Engine, *, cuda_graph: bool) -> None:
        self._cuda_engine, self._kept_in = cuda_engine, _user_cache(engine)
        self._runtime_config = cuda_engine.create_runtime_config()
        self._runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cuda_graph = cuda_graph
        if cuda_graph:
            self._runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._kernel_cache = self._runtime_config.create_runtime_cache()
        # The library refuses what another version, driver or GPU compiled.
        self._known = next(
            (kept for path in (self._kept_in, engine.folder / RUNTIME_CACHE) if self._takes(kept := _read(path))), b""
        )
        self._runtime_config.set_runtime_cache(self._kernel_cache)

    def new_context(self) -> Any:
        """An execution context; None where the library has no memory for one."""
        return self._cuda_engine.create_execution_context(self._runtime_config)

    def can_record(self, context: Any, stream: int) -> bool:
        """Whether calls of a context are recorded as CUDA graphs, where that was asked for."""
        return not self._cuda_graph or bool(context.is_stream_capturable(stream))

    def compiled(self) -> bytes:
        """What is compiled by now."""
        return bytes(memoryview(self._kernel_cache.serialize()))

    def keep(self) -> None:
        """Write what is compiled into the user's cache folder; where nothing can be written, the next run compiles."""
        compiled = self.compiled()
        if self._kept_in is not None and compiled != self._known:
            with contextlib.suppress(OSError):
                self._kept_in.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._kept_in, compiled)

    def _takes(self, kept: bytes) -> bool:
        return bool(kept) and bool(self._kernel_cache.deserialize(kept))


def _user_cache(engine: Engine) -> Path | None:
    try:
        return cache_folder() / "rtx" / f"{engine.sha256}.cache"
    except UserError:  # a user without a home folder
        return None


def _read(path: Path | None) -> bytes:
    try:
        return b"" if path is None else path.read_bytes()
    except OSError:
        return b""
