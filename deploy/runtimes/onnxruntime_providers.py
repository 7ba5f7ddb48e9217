"""ONNX Runtime's execution providers: their options, and what TensorRT's needs of this machine.

Nothing here imports onnxruntime.
"""

import ctypes
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnx import ModelProto

from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.nodes import graph_inputs
from upvits.deploy.runtimes.interface import BuildOptions, Missing

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"

RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_PREFIXES = {TENSORRT: "trt_", TENSORRT_RTX: "nv_"}
_GRAPH_OPTION = {CUDA: "enable_cuda_graph", TENSORRT: "trt_cuda_graph_enable", TENSORRT_RTX: "enable_cuda_graph"}
_MIB = 1 << 20


def build_settings(provider: str, model: ModelProto, options: BuildOptions) -> dict[str, str]:
    """Options of a provider that follow from how an engine is built.

    Raises:
        UserError: an optimization profile cannot be made, because an axis other than the first is dynamic.
    """
    if provider == CUDA:
        return {**exact_settings(provider), **_memory("gpu_mem_limit", options)}
    if provider not in _PREFIXES:
        return {}
    prefix = _PREFIXES[provider]
    batch = options.batch
    settings = {
        f"{prefix}profile_{name}_shapes": _shapes(model, size)
        for name, size in (("min", batch.min), ("opt", batch.opt), ("max", batch.max))
    }
    settings |= _memory(f"{prefix}max_workspace_size", options)
    if provider == TENSORRT:
        # The provider's networks are not strongly typed: a precision that is not switched on does not run.
        on = {"fp16": ("fp16",), "bf16": ("bf16",), "int8": ("int8", "fp16")}.get(options.precision, ())
        settings |= {f"trt_{name}_enable": "1" for name in on}
    return settings


def device_settings(provider: str, gpu: int) -> dict[str, str]:
    """Options of a provider that name the GPU, by CUDA's number."""
    return {} if provider == CPU else {"device_id": str(gpu)}


def exact_settings(provider: str) -> dict[str, str]:
    """Options with which fp32 means fp32: CUDA would otherwise multiply in TF32."""
    return {"use_tf32": "0"} if provider == CUDA else {}


def run_settings(provider: str, cache: Path | None, *, cuda_graph: bool) -> dict[str, str]:
    """Options of a provider that belong to a session: where its engines are kept, and CUDA graphs."""
    settings = {_GRAPH_OPTION[provider]: "1"} if cuda_graph and provider in _GRAPH_OPTION else {}
    if provider == TENSORRT and cache is not None:
        settings |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
    if provider == TENSORRT_RTX and cache is not None:
        settings |= {"nv_runtime_cache_path": str(cache)}
    return settings


def compiled_engines(cache: Path) -> frozenset[str]:
    """Names of the engines of TensorRT that a cache folder holds; model, shapes, precision and GPU are in the name."""
    return frozenset(path.name for path in cache.glob("*.engine"))


def missing_tensorrt(provider_library: Path) -> Missing | None:
    """What the TensorRT provider lacks: it opens with a single major version of libnvinfer.

    Args:
        provider_library: the provider's shared library in the onnxruntime package.
    """
    content = provider_library.read_bytes() if provider_library.is_file() else b""
    linked = re.search(rb"libnvinfer\.so\.(\d+)", content)
    if linked is None:  # other systems name the library differently; the session will tell
        return None
    major = int(linked[1])
    if _load_nvinfer(major):
        return None
    try:
        installed = f"installed is TensorRT {version('tensorrt')}"
    except PackageNotFoundError:
        installed = "no TensorRT is installed"
    return Missing(
        f"This onnxruntime's TensorRT provider opens with TensorRT {major} (libnvinfer.so.{major}); {installed}.",
        f"pip install 'tensorrt>={major},<{major + 1}'",
    )


def _load_nvinfer(major: int) -> bool:
    """Load libnvinfer where pip or the system put it, so that the provider finds it."""
    folders = [Path()]
    package = importlib.util.find_spec("tensorrt_libs")
    folders += [Path(place) for place in (package.submodule_search_locations or [])] if package is not None else []
    for folder in folders:
        try:
            for name in ("libnvinfer", "libnvonnxparser"):
                ctypes.CDLL(str(folder / f"{name}.so.{major}"), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def _memory(name: str, options: BuildOptions) -> dict[str, str]:
    return {} if options.workspace_mib is None else {name: str(options.workspace_mib * _MIB)}


def _shapes(model: ModelProto, batch: int) -> str:
    """Shapes of the inputs as providers want them, for example "images:8x3x224x224"."""
    parts = []
    for value in graph_inputs(model):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if 0 in sizes[1:]:
            raise UserError(
                f"axis {sizes.index(0, 1)} of the input {value.name} is dynamic",
                why="An optimization profile is made for batches; only the first axis may be dynamic.",
                fix="Export the model for a fixed image size, or fix the axis with "
                "onnxruntime.tools.make_dynamic_shape_fixed.",
            )
        parts.append(f"{value.name}:{'x'.join(map(str, [sizes[0] or batch, *sizes[1:]]))}")
    return ",".join(parts)
