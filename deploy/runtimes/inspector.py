"""What the engine inspector of TensorRT and TensorRT-RTX says about an engine, as JSON of TensorRT 10 or 11.

TensorRT 11 renamed `Bindings` to `I/O Tensors` (not read here) and parted `Format/Datatype` in two fields.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from upvits.deploy.runtimes.kernels import PRODUCT_OPS, Compiled, Kernel, onnx_nodes, op_of, widest

_SOURCE = "engine inspector"
_TYPE_FIELDS = ("Format/Datatype", "Datatype", "DataType", "Format")
# In this order: "UInt8" must not count as "Int8", nor "BF16" as "FP16".
_TYPES = (
    (r"bf16|bfloat16", "bf16", 2),
    (r"fp8|float8|e4m3", "fp8", 1),
    (r"(?<!u)int8", "int8", 1),
    (r"fp16|half", "fp16", 2),
    (r"fp32|float(?!8)", "fp32", 4),
)
_NOTHING_RUNS = frozenset({"constant", "noop", "shape_call", "signal", "wait"})
_OPS = {"reformat": "reformat", "shuffle": "reformat", "slice": "reformat", "concatenation": "reformat", "cast": "cast"}


def read_inspector(text: str, memory_bytes: int | None = None) -> Compiled | None:
    """The layers that an inspector lists; None when they are names alone or not JSON as it is known.

    Args:
        text: `EngineInspector.get_engine_information(JSON)` of an engine built with detailed profiling verbosity.
        memory_bytes: what the engine says about its scratch memory.
    """
    try:
        layers = json.loads(text)["Layers"]
        kernels = tuple(_kernel(layer) for layer in layers if _runs(layer))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    products: dict[str, str] = {}
    for kernel in kernels:
        if kernel.op in PRODUCT_OPS:
            for node in kernel.nodes:
                products[node] = widest([products.get(node, ""), kernel.precision])
    return Compiled(_SOURCE, kernels, products, memory_bytes) if kernels else None


def _runs(layer: Mapping[str, Any]) -> bool:
    return str(layer["LayerType"]).lower() not in _NOTHING_RUNS


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    name, kind = str(layer["Name"]), str(layer["LayerType"]).lower()
    op = _op(name, kind)
    reads, writes = layer["Inputs"], layer["Outputs"]
    # A product runs in what it reads, though its result may be wider; all else in the widest of what it touches.
    precisions = [_type(tensor)[0] for tensor in (reads[:1] if op in PRODUCT_OPS else [*reads, *writes])]
    nodes = onnx_nodes(str(layer.get("Metadata", ""))) or _nodes_in_name(name)
    return Kernel(name, op, widest(precisions), nodes, _bytes([*reads, *writes], layer.get("Weights")))


def _op(name: str, kind: str) -> str:
    if "conv" in kind:
        return "Conv"
    if "gemm" in kind or "matrix" in kind or name.startswith("__myl_Fc"):
        return "MatMul"
    return "Conv" if name.startswith("__myl_Corr") else _OPS.get(kind, op_of(name))


def _type(tensor: Mapping[str, Any]) -> tuple[str, int]:
    """Precision and bytes per element of a tensor; "other" for whole numbers and what is not known."""
    said = " ".join(str(tensor[field]) for field in _TYPE_FIELDS if field in tensor).lower()
    _, precision, width = next((entry for entry in _TYPES if re.search(entry[0], said)), ("", "other", 0))
    return precision, width


def _bytes(tensors: list[Mapping[str, Any]], weights: object) -> int | None:
    """Bytes of tensors and weights; None when a shape is not known."""
    total = 0
    for tensor in tensors:
        sizes, width = tensor.get("Dimensions"), _type(tensor)[1]
        if not isinstance(sizes, list) or any(not isinstance(size, int) or size < 0 for size in sizes):
            return None
        total += math.prod(sizes) * width
    if isinstance(weights, Mapping):
        total += int(weights.get("Count", 0)) * _type({"Format": weights.get("Type", "")})[1]
    return total


def _nodes_in_name(name: str) -> tuple[str, ...]:
    """ONNX nodes in a layer's name such as "conv1 + relu1" or "a+b_myl0_3"."""
    return tuple(part.strip() for part in re.sub(r"_myl\d+_\d+$", "", name).split("+"))
