"""Inputs of models that are measured on random numbers, and how much memory a call takes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import psutil
from onnx import ModelProto, TensorProto, ValueInfoProto

from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.files import inferred_graph
from upvits.deploy.graphs.nodes import copied, graph_inputs
from upvits.deploy.runtimes import Arrays

_MEMORY_SHARE = 0.25  # of what is free, for the inputs of one call
_LARGEST = 3  # tensors that a call holds at the same time, about


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a model. Sizes are None where they are open; no sizes at all where nothing is known."""

    name: str
    dtype: np.dtype[np.generic]
    sizes: tuple[int | None, ...] | None


def random_feeds(inputs: Sequence[Input], batch: int, shapes: Mapping[str, tuple[int, ...]], model: str) -> Arrays:
    """Random inputs of one call.

    Args:
        inputs: of the model.
        batch: taken for the first axis of every input where it is open.
        shapes: sizes by input name for what the model leaves open; a first axis that is open follows `batch`.
        model: name for messages.

    Raises:
        UserError: a size is open and not given, contradicts the model, or the arrays would not fit into memory.
    """
    known = {spec.name: spec for spec in inputs}
    for name in shapes:
        if inputs and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"{model} has no input {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
                fix=f"Its inputs: {', '.join(known)}.",
            )
    if not inputs and not shapes:
        raise UserError(
            f"the inputs of {model} are not known",
            why="There is no ONNX file beside the engine that tells their shapes.",
            fix="Give each of them, for example --input-shape images=1x3x224x224.",
        )
    needed = inputs or [Input(name, np.dtype(np.float32), None) for name in shapes]
    sized = [(spec, _shape(spec, batch, shapes.get(spec.name), model)) for spec in needed]
    first = sized[0][1]
    if first and first[0] != batch:
        raise UserError(
            f"{model} does not take batch {batch}",
            why=f"Its batch is fixed at {first[0]}.",
            fix=f"Measure with --batches {first[0]}, or export it with a dynamic batch.",
        )
    _check_memory(sized, model)
    generator = np.random.default_rng(0)
    return {spec.name: _noise(generator, shape, spec.dtype) for spec, shape in sized}


def inputs_of(model: ModelProto, name: str) -> tuple[Input, ...]:
    """The inputs of an ONNX model that have to be fed.

    Raises:
        UserError: an input is no tensor of numbers.
    """
    return tuple(_input(value, name) for value in graph_inputs(model))


def activation_bytes(graph: ModelProto, feeds: Arrays) -> int:
    """Bytes of the largest tensors that a model makes of these inputs: about what it holds at once, weights apart.

    Sizes that cannot be inferred count as 1: it may hold more.
    """
    sized = copied(graph)
    for value in sized.graph.input:
        if value.name in feeds:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, feeds[value.name].shape))
    for value in sized.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    inferred = inferred_graph(sized)
    return sum(sorted(map(_bytes_of, (*inferred.value_info, *inferred.output)))[-_LARGEST:])


def _bytes_of(value: ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    except KeyError:  # not known
        itemsize = 4
    values: int = math.prod(max(1, size.dim_value) for size in tensor.shape.dim)
    return int(itemsize) * values


def _input(value: ValueInfoProto, model: str) -> Input:
    tensor = value.type.tensor_type
    others = (TensorProto.UNDEFINED, TensorProto.STRING, TensorProto.BFLOAT16)
    numbers = value.type.HasField("tensor_type") and tensor.elem_type not in others
    if not numbers or tensor.elem_type not in TensorProto.DataType.values():
        raise UserError(
            f"input {value.name} of {model} cannot be filled with random numbers",
            why="Only tensors of numbers that NumPy has can be made here.",
        )
    sizes = None
    if tensor.HasField("shape"):
        sizes = tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim)
        if any(size is not None and size < 0 for size in sizes):
            raise UserError(f"{model} is damaged", why=f"Input {value.name} has shape {list(sizes)}.")
    return Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), sizes)


def _shape(spec: Input, batch: int, given: tuple[int, ...] | None, model: str) -> tuple[int, ...]:
    """All sizes of an input: the fixed ones, `batch` for an open first axis, and `given` for other open axes."""
    sizes = spec.sizes
    if sizes is None and given is not None:  # the model does not even say how many axes it has
        sizes = (None,) * len(given)
    written = "?" if sizes is None else "x".join("?" if size is None else str(size) for size in sizes)
    if sizes is None or (given is None and None in sizes[1:]):
        raise UserError(
            f"input {spec.name} of {model} has open sizes: {written}",
            why="Only the first axis, the batch, is known from --batches.",
            fix=f"Give them, for example --input-shape {spec.name}={written.replace('?', '224')}.",
        )
    requested = sizes if given is None else given
    pairs = list(zip(sizes, requested, strict=False))
    if len(requested) != len(sizes) or any(size not in (None, other) for size, other in pairs):
        raise UserError(
            f"--input-shape {spec.name}={'x'.join(map(str, requested))} does not fit {model}",
            why=f"It has {written}.",
            fix="Give as many sizes as it has; only those marked ? are free.",
        )
    # only the first axis can still be open, or is the user's to follow the batch
    first = batch if sizes[:1] == (None,) else requested[0] if requested else None
    return tuple(size for size in (first, *requested[1:]) if size is not None)


def _check_memory(sized: Sequence[tuple[Input, tuple[int, ...]]], model: str) -> None:
    """Refuse absurd shapes before anything is allocated."""
    needed = sum(math.prod(shape) * spec.dtype.itemsize for spec, shape in sized)
    free = psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * free:
        raise UserError(
            f"the inputs of {model} are too large: {needed / 2**30:.1f} GiB",
            why=f"This machine has {free / 2**30:.1f} GiB free, and a model needs several times its inputs.",
            fix="Choose a smaller batch or smaller --input-shape.",
        )


def _noise(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
    if dtype.kind == "f":
        return generator.standard_normal(shape, np.float32).astype(dtype)
    if dtype == np.uint8 or dtype.kind == "b":
        return generator.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
    return np.zeros(shape, dtype)  # the only index or token that every table has
