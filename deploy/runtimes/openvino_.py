"""OpenVINO, on CPUs and on Intel GPUs.

The engine is an ONNX file, compiled when it is opened: that takes seconds, and what OpenVINO exports instead opens on
no other machine. OpenVINO takes the precision of what is not quantized from a hint, not from the graph: with the hint
for fp32 it runs fp16 graphs in fp32, and casts around softmax keep attention from being fused (DeiT-T in bf16, 1
thread: 2.1 times as fast as fp32 with them, 2.7 times without). So half-precision graphs are written back to fp32,
with the weights as they were rounded, and the hint says what runs.

The only file that imports openvino. (The trailing underscore keeps the module apart from the library.)
"""

import functools
import importlib.util
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from upvits.calib_data.errors import UserError
from upvits.calib_data.installation import install_line
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.graphs.files import inferred_graph, keeps_weights_apart, openable
from upvits.deploy.graphs.nodes import copied, endless_loops, graph_inputs
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.runtimes.engine_folder import (
    build_failed,
    check_built,
    check_request,
    no_targets,
    runnable_engine,
    save_engine,
)
from upvits.deploy.runtimes.interface import (
    DEFAULT_RUN,
    Arrays,
    BuildOptions,
    Built,
    CallTimes,
    Engine,
    LayerTime,
    Missing,
    RunOptions,
)
from upvits.deploy.runtimes.threads import random_feeds, worthwhile_threads
from upvits.deploy.store.drafts import scratch_folder

# What of a device's OPTIMIZATION_CAPABILITIES a precision needs, and the hint for what is not quantized.
_CAPABILITY = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "INT8"}
_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8", "f8e4m3": "fp8"}
_GEMMS = ("FullyConnected", "Convolution", "GroupConvolution", "Deconvolution")
_FUSED_KINDS = ("Subgraph", "ScaledDotProductAttention")
_REFORMATS = ("Reorder", "Reshape", "Transpose")
_NOT_RUN = ("Const", "Input", "Output", "Parameter", "Result")
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class OpenVino:
    """OpenVINO on a kind of device."""

    name: str
    device: str
    base_precision: str
    libraries: tuple[str, ...] = ("openvino",)
    on_nvidia: bool = False
    has_targets: bool = False
    has_batch_profile: bool = False

    @property
    def on_cpu(self) -> bool:
        return self.device == "CPU"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that the device computes in; all of them where OpenVINO or the device is missing."""
        if self.missing_to_build() is not None:
            return tuple(_CAPABILITY)
        return tuple(name for name, needed in _CAPABILITY.items() if needed in _capabilities(self.device))

    def missing_to_build(self) -> Missing | None:
        if importlib.util.find_spec("openvino") is None:
            return Missing("OpenVINO is not installed.", install_line("openvino"))
        try:
            devices = _core().available_devices
        except (ImportError, OSError, RuntimeError) as error:
            return Missing(f"OpenVINO is installed but does not load: {error}", "Reinstall openvino.")
        if not any(device.split(".")[0] == self.device for device in devices):
            fix = f"Install the driver of the Intel {self.device}, or use the runtime openvino."
            return Missing(f"OpenVINO finds no {self.device} here, only {', '.join(devices) or 'nothing'}.", fix)
        return None

    def missing_to_run(self) -> Missing | None:
        return self.missing_to_build()

    def targets_for(self, precision: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        return no_targets(self, targets)

    def build(self, onnx_path: Path, folder: Path, options: BuildOptions) -> Engine:
        model = check_request(self, onnx_path, folder, options)
        no_targets(self, options.targets)
        started = time.perf_counter()
        model = only_products_quantized(model)
        with scratch_folder() as work:
            source = openable(widened(model), work, apart=keeps_weights_apart(onnx_path))
            hint = _HINTS[options.precision if options.precision in _HINTS else self.base_precision]
            settings: dict[str, str | int | bool] = {"device": self.device, "inference_precision": hint}
            try:
                built = _built(_compile(source, self.device, hint, 1), model)
                check_built(built, options, self)
                if self.on_cpu:
                    settings["threads"] = worthwhile_threads(
                        lambda count: OpenVinoSession(source, self.device, hint, count),
                        random_feeds(model, options.batch.opt),
                        usable_cores(),
                    )
            except RuntimeError as error:
                raise build_failed(self, onnx_path, model, _unknown_operator(error, model) or _reason(error)) from error
            return save_engine(
                self,
                folder,
                "model.onnx",
                source,
                options=options,
                targets=(),
                seconds=time.perf_counter() - started,
                library="openvino",
                library_version=_version(),
                onnx_path=onnx_path,
                settings=settings,
                built=built,
            )

    def open(self, folder: Path, options: RunOptions = DEFAULT_RUN) -> "OpenVinoSession":
        engine = runnable_engine(self, folder)
        if engine.precision not in self.precisions:
            raise UserError(
                f"{engine.path} computes in {engine.precision}",
                why=f"This machine's {self.device} has {', '.join(self.precisions)}.",
                fix="Build the engine again on this machine with `upvits-deploy engine`.",
            )
        threads = options.threads or engine.threads("threads") or usable_cores()
        hint = str(engine.settings.get("inference_precision", ""))
        try:
            return OpenVinoSession(engine.path, self.device, hint, threads)
        except RuntimeError as error:
            raise UserError(f"{self.name} cannot open {engine.path}", why=_reason(error)) from error


class OpenVinoSession:
    """A model that OpenVINO compiled; it takes a call at a time."""

    def __init__(self, model: bytes | Path, device: str, hint: str, threads: int) -> None:
        self._model, self._device, self._hint, self._threads = model, device, hint, threads
        self.on_gpu = device != "CPU"
        content = model.read_bytes() if isinstance(model, Path) else model
        onnx_model = onnx.load_model_from_string(content)  # a tensor of OpenVINO's has several names, in no order
        if loops := endless_loops(onnx_model):
            raise RuntimeError(f"The loop {loops[0]} need not end, and OpenVINO cannot stop it")
        compiled = _compile(model, device, hint, threads)
        self._request: Any = compiled.create_infer_request()
        inputs = {value.name: value.type.tensor_type.elem_type for value in graph_inputs(onnx_model)}
        self.input_names: tuple[str, ...] = tuple(inputs)
        self.output_names: tuple[str, ...] = tuple(value.name for value in onnx_model.graph.output)
        self._types = {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in inputs.items()}
        self.settings: Mapping[str, str | int | bool] = {
            "device": str(_core().get_property(device, "FULL_DEVICE_NAME")).strip(),
            "inference_precision": hint,
            **({"intra_op_threads": threads} if device == "CPU" else {}),
        }

    def run(self, feeds: Arrays) -> dict[str, _Array]:
        with _run_errors(self._device):
            self._bind(feeds)
            self._request.infer()
            return self._outputs(self._request)

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        total = np.empty(calls)
        with _run_errors(self._device):
            self._bind(feeds)
            self._request.infer()  # buffers for these shapes
            for index in range(calls):
                started = time.perf_counter()
                self._request.start_async()
                self._request.wait()
                total[index] = time.perf_counter() - started
        return CallTimes(total=total)

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[LayerTime, ...]:
        if self._request is None:
            raise ValueError("the session is closed")
        # Compiled a second time, with counters: without them the first stays as fast as it is.
        compiled = _compile(self._model, self._device, self._hint, self._threads, profile=True)
        request = compiled.create_infer_request()
        inputs = {name: np.ascontiguousarray(feeds[name], self._types[name]) for name in self.input_names}
        profiled: dict[str, list[Any]] = {}
        for call in range(calls + 1):
            request.infer(inputs)
            for layer in request.profiling_info if call else ():  # the first call warms up
                profiled.setdefault(layer.node_name, []).append(layer)
        nodes = {op.get_friendly_name(): _facts(op) for op in compiled.get_runtime_model().get_ordered_ops()}
        return tuple(
            LayerTime(
                name=nodes.get(name, {}).get("originalLayersNames", "").strip(",") or name,
                op=layers[-1].node_type,
                ms=float(np.median([layer.real_time.total_seconds() for layer in layers])) * 1e3,
                precision=_NAMES.get(layers[-1].exec_type.rsplit("_", 1)[-1], "other"),
            )
            for name, layers in profiled.items()
            if layers[-1].status.name == "EXECUTED" and layers[-1].node_type not in _NOT_RUN
        )

    def close(self) -> None:
        self._request = None

    def __enter__(self) -> "OpenVinoSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bind(self, feeds: Arrays) -> None:
        """Let the request read these arrays where they are; it keeps them alive."""
        if self._request is None:
            raise ValueError("the session is closed")
        openvino = _library()
        for name in self.input_names:
            array = np.ascontiguousarray(feeds[name], self._types[name])  # fp16 inputs became fp32 ones
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def _outputs(self, request: Any) -> dict[str, _Array]:
        return {name: request.get_tensor(name).data.copy() for name in self.output_names}


def widened(model: ModelProto) -> ModelProto:
    """The model with its fp16 and bf16 tensors in fp32: weights keep their rounded values, casts go."""
    if not any(tensor.data_type in _HALVES for tensor in model.graph.initializer):
        return model
    result = copied(model)
    graph = result.graph
    for tensor in graph.initializer:
        _widen(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i in _HALVES:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t"):
                _widen(attribute.t)
    _drop_casts(graph.node, model, {value.name for value in graph.output})
    return result


def only_products_quantized(model: ModelProto) -> ModelProto:
    """The model in which matrix products alone read quantized activations; convolutions keep their rounded weights.

    OpenVINO 2026.4 computes int8 convolutions wrong on a CPU with AMX: 4x4 pixels without overlap gave noise, and
    PVTv2-B0 with nothing but its 8x8 convolution quantized kept 18 dB instead of 60 (batch 8). It also moves the
    quantization of a convolution's output through the concatenation that follows in a ViT: DeiT-T kept 16 dB instead
    of 27. With quantized products alone both are as good as in ONNX Runtime.
    """
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    weights = {tensor.name for tensor in model.graph.initializer}
    before = {
        node.output[0]: sources[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and sources.get(node.input[0]) not in (None, *weights)
    }
    result = copied(model)
    for node in result.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "QuantizeLinear"):
            for index, name in enumerate(node.input):
                node.input[index] = before.get(name, name)
    return result


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _HALVES:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _drop_casts(nodes: Any, model: ModelProto, outputs: set[str]) -> None:
    """Take out the casts that are fp32 to fp32 now: those that were between floating-point types."""
    floats = _float_tensors(model)
    renamed: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in nodes:
        dropped = node.op_type == "Cast" and {*node.input, *node.output} <= floats and node.output[0] not in outputs
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        if dropped:
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(NodeProto.FromString(node.SerializeToString()))
    del nodes[:]
    nodes.extend(kept)


def _float_tensors(model: ModelProto) -> set[str]:
    graph = inferred_graph(model)
    floats = (TensorProto.FLOAT, *_HALVES)
    values = (*graph.input, *graph.output, *graph.value_info)
    activations = {value.name for value in values if value.type.tensor_type.elem_type in floats}
    return activations | {tensor.name for tensor in graph.initializer if tensor.data_type in floats}


def _library() -> Any:
    """The library. Its tools count their uses in the home folder and report them; here they find no way to."""
    blocked = "openvino_telemetry"
    if "openvino" not in sys.modules and blocked not in sys.modules:
        sys.modules[blocked] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules[blocked]
        return openvino
    import openvino

    return openvino


@functools.cache
def _core() -> Any:
    return _library().Core()


def _version() -> str:
    return str(_library().__version__).split("-")[0]


@functools.cache
def _capabilities(device: str) -> tuple[str, ...]:
    return tuple(_core().get_property(device, "OPTIMIZATION_CAPABILITIES"))


def _compile(model: bytes | Path, device: str, hint: str, threads: int, *, profile: bool = False) -> Any:
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": profile}
    if device == "CPU":
        # Pinned threads of two sessions would share cores that others leave idle.
        config |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    core = _core()
    read = core.read_model(model) if isinstance(model, Path) else core.read_model(model, b"")
    return core.compile_model(read, device, config)


def _built(compiled: Any, model: ModelProto) -> Built:
    layers = [_facts(op) for op in compiled.get_runtime_model().get_ordered_ops()]
    layers = [layer for layer in layers if layer.get("layerType") not in _NOT_RUN]
    kinds = [layer.get("layerType", "") for layer in layers]
    softmaxes = {name for node in model.graph.node if node.op_type == "Softmax" for name in (node.name, node.output[0])}
    facts = GraphFacts(model)
    return Built(
        source="OpenVINO's execution graph",
        layers=len(layers),
        by_precision=_counted(layers),
        gemms=_counted([layer for layer in layers if layer.get("layerType") in _GEMMS]),
        planned=facts.gemms(),
        attention_blocks=facts.attention_blocks(),
        attention_fused=sum(
            layer.get("layerType") in _FUSED_KINDS
            and not softmaxes.isdisjoint(layer.get("originalLayersNames", "").split(","))
            for layer in layers
        ),
        casts=kinds.count("Convert"),
        reformats=sum(kind in _REFORMATS for kind in kinds),
        memory_bytes=None,
    )


def _counted(layers: Sequence[Mapping[str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        precision = _NAMES.get(layer.get("runtimePrecision", ""), "other")
        counts[precision] = counts.get(precision, 0) + 1
    return counts


def _facts(op: Any) -> dict[str, str]:
    """What the execution graph says of a layer."""
    return {name: value.astype(str) for name, value in op.get_rt_info().items() if hasattr(value, "astype")}


def _reason(error: Exception) -> str:
    """The library's message without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith(("Exception from", "at ")))


@contextmanager
def _run_errors(device: str) -> Iterator[None]:
    """Turn what a call can fail with into messages."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"OpenVINO cannot run this model on these inputs on the {device}",
            why=_reason(error),
            fix="Check sizes and values of the inputs against the model; use smaller batches if memory ran out.",
        ) from error


def _unknown_operator(error: Exception, model: ModelProto) -> str:
    """Names a node whose operator the library does not know; "" when that is not what went wrong."""
    operators = re.search(r"No conversion rule found for operations: *(\S+)", str(error))
    if operators is None:
        return ""
    operator = operators[1].strip(",").rsplit(".", 1)[-1]
    names = [node.name or node.output[0] for node in model.graph.node if node.op_type == operator]
    return f"OpenVINO does not know the operator {operator} of node {', '.join(names[:3])}."


OPENVINO = OpenVino("openvino", "CPU", "fp32")
OPENVINO_GPU = OpenVino("openvino-gpu", "GPU", "fp16")
