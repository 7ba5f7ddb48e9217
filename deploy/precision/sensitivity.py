"""How much each layer loses in a precision, all layers in a single pass."""

from collections.abc import Iterable

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import progress_bar
from upvits.deploy.graphs.nodes import Array, initializers
from upvits.deploy.precision.calibration import check_batch
from upvits.deploy.precision.convert import QUANTIZED, Converted
from upvits.deploy.precision.quantize import activation_scale, cut_projections, quantized_weight
from upvits.deploy.precision.rounding import rounded, rounding_nodes
from upvits.deploy.precision.smoothing import fold_outliers
from upvits.deploy.precision.weight_layers import WeightLayer, prepared, weight_layers
from upvits.deploy.runtimes.onnxruntime_ import open_judged


def layer_sqnr(
    model: ModelProto,
    converted: Converted,
    batches: Iterable[Array],
    *,
    quiet: bool = False,
    total: int | None = None,
) -> dict[str, float]:
    """Signal over error in dB of every layer in the precision, each given the right inputs.

    The graph gets a second copy of each layer, with rounded input and weight, and gives only sums of squares out.

    Args:
        model: fp32 ONNX model with a single input.
        converted: what `convert` made of it, in another precision than fp32.
        batches: inputs as the model takes them.
        quiet: no progress bar.
        total: number of batches, for the progress bar.

    Returns:
        dB by name of the node, worst first.

    Raises:
        UserError: no images were given, or they have another shape or type than the input.
    """
    twins, probes = _with_twins(prepared(model), converted)
    value = twins.graph.input[0]
    signal, noise = dict.fromkeys(probes, 0.0), dict.fromkeys(probes, 0.0)
    seen = 0
    with (
        open_judged(twins) as session,
        progress_bar(quiet=quiet) as progress,
    ):
        task = progress.add_task("error of each layer", total=total)
        for batch in batches:
            check_batch(value, batch)
            outputs = session.run({value.name: batch})
            for name, (signal_output, noise_output) in probes.items():
                signal[name] += float(outputs[signal_output])
                noise[name] += float(outputs[noise_output])
            seen += len(batch)
            progress.advance(task)
    if not seen:
        raise UserError("no images were given to measure the error of layers with")
    result = {name: _decibel(signal[name], noise[name]) for name in probes}
    return dict(sorted(result.items(), key=lambda entry: entry[1]))


def _with_twins(model: ModelProto, converted: Converted) -> tuple[ModelProto, dict[str, tuple[str, str]]]:
    """The model with sums of squares of each layer's result and error, and their names by layer."""
    precision, ranges = converted.precision, converted.ranges
    if converted.folded and ranges is not None:
        model, ranges, _ = fold_outliers(model, ranges)
    graph, values, whole = model.graph, initializers(model), cut_projections(model)
    nodes = {node.name: node for node in graph.node}
    rounded_sources: set[str] = set()
    probes = {}
    del graph.output[:]
    for layer in weight_layers(model):
        if layer.name in converted.kept or (precision in QUANTIZED and layer.name not in converted.quantized):
            continue
        source = f"{layer.source}_twin"
        if source not in rounded_sources:
            scale = 1.0 if ranges is None else float(activation_scale(ranges, layer.source, precision))
            graph.node.extend(rounding_nodes(graph, layer.source, source, precision, scale))
            rounded_sources.add(source)
        weight = _rounded_weight(layer, values[layer.weight], precision, layer.name in whole)
        graph.initializer.append(numpy_helper.from_array(weight, f"{layer.name}_twin_weight"))
        probes[layer.name] = _add_twin(graph, nodes[layer.name], source)
    return model, probes


def _add_twin(graph: GraphProto, node: NodeProto, source: str) -> tuple[str, str]:
    twin = NodeProto()
    twin.CopyFrom(node)
    twin.name = f"{node.name}_twin"
    twin.input[0], twin.input[1], twin.output[0] = source, f"{twin.name}_weight", twin.name
    error, signal, noise = (f"{twin.name}_{part}" for part in ("error", "signal", "noise"))
    graph.node.extend(
        [
            twin,
            helper.make_node("Sub", [node.output[0], twin.name], [error], error),
            helper.make_node("ReduceSumSquare", [node.output[0]], [signal], signal, keepdims=0),
            helper.make_node("ReduceSumSquare", [error], [noise], noise, keepdims=0),
        ]
    )
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in (signal, noise))
    return signal, noise


def _rounded_weight(layer: WeightLayer, weight: Array, precision: str, whole: bool) -> Array:
    if precision not in QUANTIZED:
        return rounded(weight, precision)
    axis = None if whole else layer.out_axis
    values, scale = quantized_weight(weight, precision, axis)
    shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
    return np.asarray(values.astype(np.float32) * scale.reshape(shape).astype(np.float32))


def _decibel(signal: float, noise: float) -> float:
    return float("inf") if noise == 0.0 else float(10.0 * np.log10(max(signal, 1e-300) / noise))
