"""A model repository for NVIDIA Triton Inference Server: one folder a model, with `config.pbtxt` and the model itself.

Field names are those of Triton's `model_config.proto`. The text is written by hand: it is short, and protobuf's classes
for it come with Triton's client, which nobody needs to build a package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from upvits.calib_data.errors import UserError
from upvits.calib_data.paths import copy_regular, write_new
from upvits.deploy.choices import BatchProfile
from upvits.deploy.runtimes.interface import Engine

QUEUE_DELAY_US = 1000
"""How long a request may wait for others to share its batch: an order of magnitude below what a batch takes."""

_LABELS = "labels.txt"
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.BOOL: "TYPE_BOOL",
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a model with a batch axis; `dims` are the sizes after that axis."""

    name: str
    elem_type: int
    dims: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """numpy's name of the type, such as "float32"."""
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.elem_type)).name


def ports(model: ModelProto) -> tuple[Port, Port]:
    """The input and the output of a network from one image tensor to one tensor.

    Raises:
        UserError: it has more of them, no batch axis that is free, or another axis that is.
    """
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise UserError(
            f"the model has {len(model.graph.input)} inputs and {len(model.graph.output)} outputs",
            why="Only models from one image tensor to one tensor can be handed over.",
        )
    return _port(model.graph.input[0]), _port(model.graph.output[0])


def _port(value: ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    batch, *sizes = tensor.shape.dim or [None]
    if batch is None or batch.HasField("dim_value") or not all(dim.HasField("dim_value") for dim in sizes):
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        raise UserError(
            f"{value.name} has the shape {shape}",
            why="Servers form batches: the first axis has to be free, and only that one.",
            fix="Export the model with `upvits-deploy`, or with a dynamic batch and a fixed image size.",
        )
    return Port(value.name, tensor.elem_type, tuple(dim.dim_value for dim in sizes))


def config_text(
    name: str, backend: str, image: Port, answer: Port, batch: BatchProfile, *, labelled: bool, kind: str = "KIND_AUTO"
) -> str:
    """`config.pbtxt` of a model.

    Args:
        name: of the model and of its folder.
        backend: "onnxruntime" or "tensorrt".
        image: the input.
        answer: the output.
        batch: batches up to `max` are formed, those of `opt` and `max` images preferred.
        labelled: whether labels.txt lies beside it.
        kind: of the instances: "KIND_GPU", "KIND_CPU", or "KIND_AUTO" for a GPU if the server has one.
    """
    platform = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[backend]
    preferred = ", ".join(str(size) for size in sorted({batch.opt, batch.max} - {1}))
    return "\n".join(
        [
            f"name: {_quoted(name)}",
            f"platform: {_quoted(platform)}",
            f"backend: {_quoted(backend)}",
            f"max_batch_size: {batch.max}",
            f"input [ {{ {_described(image)} }} ]",
            f"output [ {{ {_described(answer)}{f' label_filename: {_quoted(_LABELS)}' if labelled else ''} }} ]",
            f"instance_group [ {{ count: 1 kind: {kind} }} ]",
            "dynamic_batching {",
            *([f"  preferred_batch_size: [ {preferred} ]"] if preferred else []),
            f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}",
            "}",
            *(_warmup(size, image) for size in sorted({1, batch.opt, batch.max})),
            "",
        ]
    )


def _described(port: Port) -> str:
    dims = ", ".join(map(str, port.dims))
    return f"name: {_quoted(port.name)} data_type: {_type(port)} dims: [ {dims} ]"


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    escaped = (f"\\{byte:03o}" if byte in b'"\\' or not 32 <= byte < 127 else chr(byte) for byte in text.encode())
    return f'"{"".join(escaped)}"'


def _type(port: Port) -> str:
    if port.elem_type not in _TYPES:
        raise UserError(f"{port.name} has a type that Triton does not take: {port.dtype}")
    return _TYPES[port.elem_type]


def _warmup(size: int, image: Port) -> str:
    """A first call before the model counts as ready: memory is reserved and kernels are chosen then."""
    dims = ", ".join(map(str, image.dims))
    value = f"data_type: {_type(image)} dims: [ {dims} ] random_data: true"
    given = f"inputs {{ key: {_quoted(image.name)} value {{ {value} }} }}"
    return f'model_warmup [ {{ name: "batch of {size}" batch_size: {size} {given} }} ]'


def write_repository(
    folder: Path,
    name: str,
    onnx_files: Sequence[Path],
    engine: Engine | None,
    image: Port,
    answer: Port,
    batch: BatchProfile,
    labels: Sequence[str] | None,
    cpu_int8: Engine | None = None,
) -> list[str]:
    """Write the models `<name>_onnx` and, with engines, `<name>_tensorrt` and `<name>_onnx_int8` below `folder`.

    Args:
        onnx_files: the ONNX file, and the files of its external data if it has any.
        engine: of TensorRT itself: Triton's TensorRT backend cannot run plans of TensorRT-RTX.
        batch: batch sizes that the ONNX models are for.
        cpu_int8: of ONNX Runtime on CPUs, in int8, to be served beside the fp32 file.

    Returns:
        The names of the models.

    Raises:
        UserError: the TensorRT engine is of another runtime, or takes no single image, which a server has to be able
            to send; or `name` is no name of a folder.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise UserError(
            f"{name[:100]!r} is no name for a model",
            why="A server finds a model in the folder of its name.",
            fix="Use letters, digits, points, hyphens and underscores.",
        )
    if engine is not None and (engine.runtime != "tensorrt" or engine.batch.min > 1):
        raise UserError(
            f"Triton cannot serve the {engine.runtime} engine for {engine.batch.min} to {engine.batch.max} images",
            why="Its TensorRT backend runs plans of TensorRT itself, and requests may come one image at a time.",
            fix="Build one with the runtime tensorrt and a batch profile that begins at 1.",
        )
    models = [(f"{name}_onnx", "onnxruntime", list(onnx_files), batch, "KIND_AUTO")]
    if cpu_int8 is not None:
        models.append((f"{name}_onnx_int8", "onnxruntime", [cpu_int8.path], batch, "KIND_CPU"))
    if engine is not None:
        models.append((f"{name}_tensorrt", "tensorrt", [engine.path], engine.batch, "KIND_GPU"))
    for model, backend, files, sizes, kind in models:
        version = folder / model / "1"
        version.mkdir(parents=True)
        for file in files:
            copy_regular(file, version / ("model.plan" if backend == "tensorrt" else file.name))
        text = config_text(model, backend, image, answer, sizes, labelled=bool(labels), kind=kind)
        write_new(version.parent / "config.pbtxt", text)
        if labels:
            write_new(version.parent / _LABELS, "".join(f"{label}\n" for label in labels))
    return [model for model, *_ in models]
