"""Ranges of what quantized layers read, from real images, in a single pass."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from upvits.calib_data.errors import GateError, UserError
from upvits.calib_data.progress import progress_bar
from upvits.deploy.graphs.nodes import Array
from upvits.deploy.precision.weight_layers import WeightLayer, nothing_to_quantize, prepared, weight_layers
from upvits.deploy.runtimes.onnxruntime_ import open_judged

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Largest absolute values of what layers with constant weights read, and of what convolutions make.

    Attributes:
        amax: by tensor, float64 [channels]: the axis that the layers sum over, and that convolutions make.
        images: how many images were seen.
        digest: sha256 of them.
        method: how a range follows from the values.
    """

    amax: Mapping[str, Floats]
    images: int
    digest: str
    method: str = "max"


def calibrate(model: ModelProto, batches: Iterable[Array], *, quiet: bool = False, total: int | None = None) -> Ranges:
    """Run images through an fp32 model, on a GPU where there is one; keep the largest absolute values in each channel.

    Memory is bounded by a batch: maxima are taken inside the graph.

    Args:
        model: fp32 ONNX model with a single input.
        batches: inputs as the model takes them, [batch, ...] each.
        quiet: no progress bar.
        total: number of batches, for the progress bar.

    Raises:
        UserError: the model has nothing to quantize, no images were given, or they have another shape or type than its
            input.
        GateError: the model computes NaN or infinity from the images; says where first.
    """
    probed, probes = _with_maxima(prepared(model))
    value = probed.graph.input[0]
    seen, digest = 0, hashlib.sha256()
    largest: dict[str, Floats] = {}
    with (
        open_judged(probed) as session,
        progress_bar(quiet=quiet) as progress,
    ):
        task = progress.add_task("calibrate", total=total)
        for batch in batches:
            check_batch(value, batch)
            outputs = session.run({value.name: batch})
            for tensor, probe in probes.items():
                _check_finite(outputs[probe], tensor)
                largest[tensor] = np.maximum(largest.get(tensor, 0.0), outputs[probe].astype(np.float64))
            for output in model.graph.output:
                _check_finite(outputs[output.name], output.name)
            digest.update(np.ascontiguousarray(batch).data)
            seen += len(batch)
            progress.advance(task)
    if not seen:
        raise UserError("no calibration images were given", fix="Quantization needs some; 128 are usual.")
    return Ranges(largest, seen, digest.hexdigest())


def check_batch(value: onnx.ValueInfoProto, batch: Array) -> None:
    """Refuse images that a model's input does not take.

    Raises:
        UserError: says both shapes and types.
    """
    tensor = value.type.tensor_type
    expected = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    fits = len(expected) == batch.ndim and all(e in (None, a) for e, a in zip(expected, batch.shape, strict=True))
    if fits and batch.dtype == helper.tensor_dtype_to_np_dtype(tensor.elem_type):
        return
    shape = ", ".join(d.dim_param or str(d.dim_value or "?") for d in tensor.shape.dim)
    raise UserError(
        f"images of shape {batch.shape} and type {batch.dtype} do not fit the model",
        why=f"Its input {value.name} is {helper.tensor_dtype_to_np_dtype(tensor.elem_type)} [{shape}].",
        fix="Give images that are preprocessed for this model.",
    )


def _with_maxima(model: ModelProto) -> tuple[ModelProto, dict[str, str]]:
    """The model with the largest absolute value per channel of every quantizable tensor as further outputs."""
    layers = {layer.source: layer for layer in reversed(weight_layers(model))}  # the first reader of each tensor
    if not layers:
        raise nothing_to_quantize()
    if len(model.graph.input) != 1:
        raise UserError(
            f"the model has {len(model.graph.input)} inputs", why="Calibration feeds a single tensor of images."
        )
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    probes = {}
    for tensor, layer in layers.items():
        probes[tensor] = f"{tensor}_amax"
        _add_maximum(model.graph, layer, dims[layer.weight], probes[tensor])
    for layer in weight_layers(model):
        if layer.op == "Conv" and layer.result not in probes:
            probes[layer.result] = f"{layer.result}_amax"
            _add_maximum(model.graph, replace(layer, source=layer.result), dims[layer.weight], probes[layer.result])
    return model, probes


def _add_maximum(graph: onnx.GraphProto, layer: WeightLayer, weight: Any, probe: str) -> None:
    source = layer.source
    if layer.op == "Conv":
        axes = [axis for axis in range(len(weight)) if axis != 1]
    else:  # a matrix product may read a tensor of any rank
        shape = numpy_helper.from_array(np.array([-1, weight[layer.in_axis]], np.int64), f"{probe}_shape")
        graph.initializer.append(shape)
        graph.node.append(helper.make_node("Reshape", [source, shape.name], [f"{probe}_rows"], f"{probe}_rows"))
        source, axes = f"{probe}_rows", [0]
    graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), f"{probe}_axes"))
    graph.node.append(helper.make_node("Abs", [source], [f"{probe}_abs"], f"{probe}_abs"))
    graph.node.append(helper.make_node("ReduceMax", [f"{probe}_abs", f"{probe}_axes"], [probe], probe, keepdims=0))
    graph.output.append(helper.make_tensor_value_info(probe, TensorProto.FLOAT, None))


def _check_finite(values: Array, tensor: str) -> None:
    if not np.isfinite(values).all():
        raise GateError(
            f"the model computes NaN or infinity at {tensor}",
            why="Ranges of such a tensor mean nothing.",
            fix="Check the model's weights and the preprocessing of the images.",
        )
