"""The thin adapter that TensorRT 10.9 to 11.x and TensorRT-RTX share.

Both libraries have the same Python API as far as it is used here; the module itself is passed in as `trt`. Networks
are strongly typed everywhere (TensorRT 11 knows nothing else), enums are found by name because their numbers changed
between versions, and capabilities are probed with `hasattr`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from calib_data.errors import UserError
from deploy.runtimes.cuda import compute_capability
from deploy.runtimes.engine_folder import build_failed
from deploy.runtimes.interface import Arrays, BatchProfile, BuildOptions, Engine, Runtime

_MIB = 1 << 20


def compile_engine(
    trt: Any,
    runtime: Runtime,
    model: ModelProto,
    onnx_path: Path,
    options: BuildOptions,
    configure: Callable[[Any], None] = lambda config: None,
) -> memoryview:
    """Build a serialized engine.

    Args:
        trt: the imported library.
        runtime: the runtime that builds, for messages.
        model: the model, in the precision that it shall run in.
        onnx_path: where it came from, for messages.
        options: batch sizes for axis 0 of inputs where that is dynamic (no other axis may be), and the limit of the
            workspace memory pool.
        configure: sets what is special to a library on the builder configuration.

    Raises:
        BuildError: the parser or the builder refused the model; names the node when the library does.
    """
    log = _messages(trt)
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        raise build_failed(runtime, onnx_path, model, _parser_error(parser))
    config = builder.create_builder_config()
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if hasattr(trt.BuilderFlag, "TF32"):
        # On by default, and then what is called fp32 multiplies with 10 bits of mantissa.
        config.clear_flag(trt.BuilderFlag.TF32)
    configure(config)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        _set_profile(profile, tensor.name, tuple(tensor.shape), options.batch)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise build_failed(runtime, onnx_path, model, "\n".join(log.errors[-2:]) or "The builder gave no reason.")
    return memoryview(plan)


class NvinferSession:
    """An engine on the first GPU. Buffers are torch tensors, so no further CUDA binding is needed."""

    def __init__(self, trt: Any, engine: Engine) -> None:
        _check_device(engine)
        log = _messages(trt)
        self._library: Any = trt.Runtime(log)
        self._engine: Any = self._library.deserialize_cuda_engine(engine.path.read_bytes())
        if self._engine is None:
            raise UserError(
                f"{engine.runtime} cannot open {engine.path}",
                why="\n".join(log.errors[-2:]) or "The library gave no reason.",
                fix="Build the engine again on this machine with `upvits-deploy engine`.",
            )
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(
                f"{engine.runtime} cannot run {engine.path}",
                why="\n".join(log.errors[-2:]) or "No execution context could be made.",
                fix="Free GPU memory, or build with a smaller largest batch.",
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = {name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.input_names: tuple[str, ...] = tuple(name for name in names if name in inputs)
        self.output_names: tuple[str, ...] = tuple(name for name in names if name not in inputs)
        self.settings: Mapping[str, str | int | bool] = {"device": torch.cuda.get_device_name(0)}
        self._dtypes = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._batch = engine.batch
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        if self._context is None:
            raise ValueError("the session is closed")
        with torch.cuda.stream(self._stream):
            held = [self._bind_input(name, feeds[name]) for name in self.input_names]
            outputs = {name: self._bind_output(name) for name in self.output_names}
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError("the engine failed to run")
            result = {name: tensor.cpu().numpy() for name, tensor in outputs.items()}
            self._stream.synchronize()
        del held  # inputs must stay alive until the GPU is done with them
        return result

    def close(self) -> None:
        self._context = self._engine = self._library = None

    def __enter__(self) -> "NvinferSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bind_input(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
        if not self._context.set_input_shape(name, array.shape):
            raise UserError(
                f"the engine does not take {name} of shape {tuple(array.shape)}",
                why=f"It was built for batches of {self._batch.min} to {self._batch.max}.",
                fix="Feed such a batch, or build an engine with another batch profile.",
            )
        tensor = torch.from_numpy(np.ascontiguousarray(array, self._dtypes[name])).cuda()
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _bind_output(self, name: str) -> torch.Tensor:
        dtype = torch.from_numpy(np.empty(0, self._dtypes[name])).dtype
        tensor = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor


def check_version(engine: Engine, version: str) -> None:
    """Refuse an engine that another version of the library built; such engines are not portable.

    Raises:
        UserError: says both versions.
    """
    if engine.library_version != version:
        raise UserError(
            f"{engine.path} was built with {engine.library} {engine.library_version}",
            why=f"Installed is {version}; engines open only with the version that built them.",
            fix=f"Install {engine.library} {engine.library_version}, or build the engine again.",
        )


def device_here() -> str:
    """This machine's GPU as a build target, such as "sm89"; "none" without one."""
    capability = compute_capability()
    return f"sm{capability[0]}{capability[1]}" if capability else "none"


def _check_device(engine: Engine) -> None:
    device = device_here()
    if engine.targets and device not in engine.targets:
        raise UserError(
            f"{engine.path} was built for {', '.join(engine.targets)}",
            why=f"The GPU of this machine is {device}.",
            fix=f"Build it again with {device} among the targets.",
        )


def _set_profile(profile: Any, name: str, shape: tuple[int, ...], batch: BatchProfile) -> None:
    rest = shape[1:]
    if any(size < 0 for size in rest):
        raise UserError(
            f"input {name} has shape {shape}",
            why="Only the batch axis may be dynamic in an engine.",
            fix="Export the model with a fixed image size.",
        )
    sizes = (batch.min, batch.opt, batch.max) if shape[0] < 0 else (shape[0],) * 3
    profile.set_shape(name, *((size, *rest) for size in sizes))


def _parser_error(parser: Any) -> str:
    """What the parser says about the first node that it refused."""
    if parser.num_errors == 0:
        return "The parser gave no reason."
    error = parser.get_error(0)
    said = [line for line in error.desc().strip().splitlines() if "catchCudaError" not in line]  # no GPU: not the cause
    name = error.node_name() if hasattr(error, "node_name") else ""
    return "\n".join([*([f"At node {name}:"] if name else []), *said])


def _messages(trt: Any) -> Any:
    """A logger that keeps errors instead of printing them; the class can only be made once the library is there."""

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Messages()
