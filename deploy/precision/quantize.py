"""int8 and fp8: quantize and dequantize nodes around the layers with constant weights.

Activations are quantized per tensor, weights per output channel, both symmetric: what TensorRT asks for. Products
of activations (attention) are left out: they are a small part of the work and most of the error.

A projection that is cut into several afterwards (q, k and v in a matrix) has a single scale for its whole weight.
TensorRT-RTX 1.7 moves the cut into the weight, cannot cut a scale per channel with it, and multiplies in fp16 instead:
38 of 50 layers of DeiT-T ran in int8 with a scale per channel, all 50 with a single scale. It costs no accuracy that
could be measured (DeiT-T and PVTv2-B0: 47.1 and 40.7 dB, instead of 47.1 and 40.4).
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.nodes import Array, copied, drop_unused_initializers, initializers
from upvits.deploy.precision.calibration import Floats, Ranges
from upvits.deploy.precision.weight_layers import WeightLayer, weight_layers

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_FP8_TAPS = 32
_IMAGE_CHANNELS = 4


def quantizable_layers(model: ModelProto, precision: str, *, on_cpu: bool = False) -> tuple[WeightLayer, ...]:
    """The layers of a prepared model that runtimes can run in this precision.

    int8: all. TensorRT-RTX 1.7 has int8 kernels for patch embeddings, 1x1 and depthwise convolutions, classifiers and
    odd widths alike. On CPUs not convolutions of images (4 channels at most), which would need a quantized result too:
    2 dB of DeiT-T for no time; nor those that the graph ends with, whose results have to stay as they are. fp8: not
    convolutions of more than 32 taps: fp8 kernels exist for 5x5, not for 6x6.
    """
    layers = weight_layers(model)
    if precision == "int8":
        channels = {tensor.name: tensor.dims[1] for tensor in model.graph.initializer if len(tensor.dims) > 1}
        ends = {value.name for value in model.graph.output}

        def in_float(layer: WeightLayer) -> bool:
            of_images = layer.groups == 1 and channels[layer.weight] <= _IMAGE_CHANNELS
            return layer.op == "Conv" and (of_images or layer.result in ends)

        return tuple(layer for layer in layers if not (on_cpu and in_float(layer)))
    taps = {tensor.name: int(np.prod(tensor.dims[2:])) for tensor in model.graph.initializer}
    return tuple(layer for layer in layers if layer.op != "Conv" or taps[layer.weight] <= _FP8_TAPS)


def quantize(
    model: ModelProto, ranges: Ranges, precision: str, layers: Collection[WeightLayer], *, conv_results: bool = False
) -> ModelProto:
    """A copy of a prepared model in which these layers read quantized activations and weights. Biases stay.

    Args:
        model: prepared fp32 model.
        ranges: of the tensors that the layers read.
        precision: "int8" or "fp8" (e4m3).
        layers: which ones.
        conv_results: quantize what convolutions make too.

    Raises:
        UserError: the ranges are those of another model.
    """
    result = copied(model)
    graph = result.graph
    values = initializers(result)
    by_node = {layer.name: layer for layer in layers}
    whole = cut_projections(model)
    done: dict[str, str] = {}  # tensors and weights that are quantized, by what to read instead
    nodes: list[NodeProto] = []
    results = {layer.result for layer in layers if layer.op == "Conv"} if conv_results else set()

    def quantized(tensor: str) -> str:
        if tensor not in done:
            done[tensor] = f"{tensor}_{precision}_dq"
            nodes.extend(_quantize_activation(graph, tensor, activation_scale(ranges, tensor, precision), precision))
        return done[tensor]

    for node in graph.node:
        layer = by_node.get(node.name)
        for index, name in enumerate(node.input):
            if name in results and layer is None:
                node.input[index] = quantized(name)
        if layer is None:
            nodes.append(node)
            continue
        axis = None if layer.name in whole else layer.out_axis
        weight = f"{layer.weight}_{precision}" + ("" if axis is None else f"_axis{axis}")
        if weight not in done:
            nodes.append(_add_weight(result, weight, values[layer.weight], precision, axis))
            done[weight] = f"{weight}_dq"
        node.input[0], node.input[1] = quantized(layer.source), done[weight]
        nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(kept)
    drop_unused_initializers(result)
    return result


def _quantize_activation(graph: GraphProto, tensor: str, scale: Floats, precision: str) -> list[NodeProto]:
    name = f"{tensor}_{precision}"
    parameters = [f"{name}_scale", f"{name}_zero_point"]
    graph.initializer.append(numpy_helper.from_array(np.asarray(scale, np.float32), parameters[0]))
    graph.initializer.append(_zero_point(parameters[1], precision, ()))
    return [
        helper.make_node("QuantizeLinear", [tensor, *parameters], [name], name),
        helper.make_node("DequantizeLinear", [name, *parameters], [f"{name}_dq"], f"{name}_dq"),
    ]


def activation_scale(ranges: Ranges, tensor: str, precision: str) -> Floats:
    """The scale of a tensor, shape []."""
    if tensor not in ranges.amax:
        raise UserError(
            f"no range is known for {tensor}", why="The model was calibrated as another graph.", fix="Calibrate again."
        )
    return _scale(ranges.amax[tensor].max(), precision)


def cut_projections(model: ModelProto) -> frozenset[str]:
    """Names of matrix products whose result is sliced, split or gathered from before anything is computed of it."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input[:1] if node.op_type != "Add" else node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in model.graph.initializer}

    def is_cut(tensor: str) -> bool:
        for node in readers.get(tensor, []):
            if node.op_type in ("Slice", "Split", "Gather"):
                return True
            moves = node.op_type in ("Reshape", "Transpose") or (node.op_type == "Add" and constants & {*node.input})
            if moves and is_cut(node.output[0]):
                return True
        return False

    return frozenset(n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and is_cut(n.output[0]))


def quantized_weight(weight: Array, precision: str, axis: int | None) -> tuple[Array, Floats]:
    """A weight as int8 or fp8 (e4m3) values, and its scales: [channels] along an axis, or a single scale, []."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    scale = _scale(np.abs(weight).max(axis=others).astype(np.float64), precision)
    scaled = weight / scale.reshape([-1 if other == axis else 1 for other in range(weight.ndim)])
    if precision == "fp8":
        return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn), scale
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8), scale


def _scale(amax: Floats, precision: str) -> Floats:
    """The smallest scale with which amax does not clip, among those that fp16 holds.

    So scales stay the same when everything else in the graph becomes fp16, even where they are tiny.
    """
    exact = np.asarray(amax, np.float64) / _LARGEST[precision]
    with np.errstate(over="ignore", under="ignore"):
        half = exact.astype(np.float16)
        up = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    up = np.maximum(up, np.finfo(np.float16).smallest_subnormal)
    return np.where(np.isfinite(up), up.astype(np.float64), exact)


def _add_weight(model: ModelProto, name: str, weight: Array, precision: str, axis: int | None) -> NodeProto:
    values, scale = quantized_weight(weight, precision, axis)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(values, name),
            numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"),
            _zero_point(f"{name}_zero_point", precision, scale.shape),
        ]
    )
    inputs = [name, f"{name}_scale", f"{name}_zero_point"]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], f"{name}_dq")
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node


def _zero_point(name: str, precision: str, shape: tuple[int, ...]) -> TensorProto:
    kind = np.dtype(np.int8) if precision == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
    return numpy_helper.from_array(np.zeros(shape, kind), name)
