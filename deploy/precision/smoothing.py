"""SmoothQuant: outliers of LayerNorm's channels move into the weights that read them (Xiao et al., arXiv 2211.10438).

int8 has a single scale for a whole activation, so a few large channels leave hardly a bit to the others. Dividing a
channel by s in LayerNorm's gain and bias, and multiplying the weights that read it by s, changes nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from upvits.deploy.graphs.nodes import Array, copied, drop_unused_initializers, get_attribute, initializers
from upvits.deploy.precision.calibration import Floats, Ranges
from upvits.deploy.precision.weight_layers import WeightLayer, weight_layers

_FLOOR = 1e-5  # of the largest channel: what is never used gets no extreme scale


def fold_outliers(
    model: ModelProto, ranges: Ranges, *, alpha: float = 0.5
) -> tuple[ModelProto, Ranges, tuple[str, ...]]:
    """Fold scales between LayerNorms and the layers that read them.

    A LayerNorm is left alone unless all that reads it, also through transposes and reshapes, are matrix products and
    convolutions with constant weights. Ranges follow by calculation, without a second calibration.

    Args:
        model: prepared fp32 model.
        ranges: of its layers' inputs.
        alpha: share of the outliers that moves into the weights, 0 to 1.

    Returns:
        A copy that computes the same, its ranges, and the names of the LayerNorms that were folded.
    """
    result = copied(model)
    values, paths = initializers(result), ChannelPaths(result)
    amax = dict(ranges.amax)
    folded = []
    for norm in [node for node in result.graph.node if node.op_type == "LayerNormalization"]:
        if any(name not in values for name in norm.input[1:]) or get_attribute(norm, "axis", -1) not in paths.last(
            norm
        ):
            continue
        layers = paths.readers(norm.output[0], len(paths.shape(norm.output[0])) - 1)
        if not layers or any(layer.source not in amax for layer in layers):
            continue
        if any(len(amax[layer.source]) != values[norm.input[1]].size for layer in layers):
            continue
        scale = _scales(layers, amax, values, alpha)
        for index, name in list(enumerate(norm.input))[1:]:
            norm.input[index] = _store(result, f"{name}_of_{norm.name}", values[name] / scale)
        for layer in layers:
            node = paths.nodes[layer.name]
            shape = [-1 if axis == layer.in_axis else 1 for axis in range(values[layer.weight].ndim)]
            node.input[1] = _store(
                result, f"{layer.weight}_of_{layer.name}", values[layer.weight] * scale.reshape(shape)
            )
        for source in {layer.source for layer in layers}:
            amax[source] = amax[source] / scale
        folded.append(norm.name)
    drop_unused_initializers(result)
    return result, replace(ranges, amax=amax), tuple(folded)


def _scales(layers: Sequence[WeightLayer], amax: dict[str, Floats], values: dict[str, Array], alpha: float) -> Floats:
    """What to divide each channel of the activations by, [channels]."""
    activations = np.max([amax[layer.source] for layer in layers], axis=0)
    weights = np.max([_in_channel_maxima(layer, values[layer.weight]) for layer in layers], axis=0)
    if not activations.any() or not weights.any():
        return np.ones_like(activations)
    activations = np.maximum(activations, _FLOOR * activations.max())
    weights = np.maximum(weights, _FLOOR * weights.max())
    return np.asarray(activations**alpha / weights ** (1 - alpha), np.float64)


def _in_channel_maxima(layer: WeightLayer, weight: Array) -> Floats:
    others = tuple(axis for axis in range(weight.ndim) if axis != layer.in_axis)
    return np.asarray(np.abs(weight).max(axis=others), np.float64)


def _store(model: ModelProto, name: str, value: Array) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
    return name


@dataclass(frozen=True, slots=True)
class _Reader:
    node: NodeProto
    index: int


class ChannelPaths:
    """Follows a channel axis from a tensor to the layers that sum over it."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes = {node.name: node for node in graph.node}
        self._layers = {layer.name: layer for layer in weight_layers(model)}
        self._values = initializers(model)
        self._outputs = {value.name for value in graph.output}
        self._readers: dict[str, list[_Reader]] = {}
        for node in graph.node:
            for index, name in enumerate(node.input):
                self._readers.setdefault(name, []).append(_Reader(node, index))
        values = [*graph.input, *graph.value_info, *graph.output]
        self._shapes = {value.name: _shape(value) for value in values}

    def shape(self, tensor: str) -> tuple[int | None, ...]:
        """Sizes of a tensor, None where they are dynamic; empty when nothing is known."""
        return self._shapes.get(tensor, ())

    def last(self, norm: NodeProto) -> tuple[int, ...]:
        """The numbers that mean the last axis of a LayerNorm's output."""
        return (-1, len(self.shape(norm.output[0])) - 1) if self.shape(norm.output[0]) else ()

    def readers(self, tensor: str, axis: int) -> list[WeightLayer]:
        """All layers that read the tensor and sum over this axis; empty when anything else reads it."""
        layers = list(self._follow(tensor, axis))
        return [] if None in layers else [layer for layer in layers if layer is not None]

    def _follow(self, tensor: str, axis: int) -> Iterator[WeightLayer | None]:
        if tensor in self._outputs:
            yield None
        for reader in self._readers.get(tensor, []):
            node, layer = reader.node, self._layers.get(reader.node.name)
            moved = self._moved(node, axis) if reader.index == 0 else None
            if moved is not None:
                yield from self._follow(node.output[0], moved)
            elif layer is not None and reader.index == 0 and layer.groups == 1 and axis == self._summed(layer):
                yield layer
            else:
                yield None

    def _summed(self, layer: WeightLayer) -> int:
        return 1 if layer.op in ("Conv", "Gemm") else len(self.shape(layer.source)) - 1

    def _moved(self, node: NodeProto, axis: int) -> int | None:
        """Where a node that only moves, picks or averages takes an axis; None when it does more or breaks it up."""
        before, after = self.shape(node.input[0]), self.shape(node.output[0])
        if node.op_type == "Transpose":
            permutation = list(get_attribute(node, "perm", range(len(before))[::-1]))
            return permutation.index(axis)
        if node.op_type == "Gather" and len(after) == len(before) + self._index_rank(node) - 1:
            picked = int(get_attribute(node, "axis", 0)) % len(before)
            return None if picked == axis else axis + (len(after) - len(before)) * (picked < axis)
        if node.op_type == "ReduceMean":
            averaged = {int(other) % len(before) for other in self._averaged(node)}
            lost = 0 if get_attribute(node, "keepdims", 1) else sum(other < axis for other in averaged)
            return axis - lost if averaged and axis not in averaged else None
        if node.op_type != "Reshape" or None in before[axis:]:
            return None
        inner = np.prod([size or 0 for size in before[axis + 1 :]])
        for place in reversed(range(len(after))):
            if None in after[place:]:
                return None
            if np.prod([size or 0 for size in after[place + 1 :]]) == inner and after[place] == before[axis]:
                return place
        return None

    def _index_rank(self, node: NodeProto) -> int:
        index = self._values.get(node.input[1])
        return len(self.shape(node.input[1])) if index is None else index.ndim

    def _averaged(self, node: NodeProto) -> Sequence[int]:
        """Axes of a ReduceMean; empty when they are not known."""
        if len(node.input) > 1:
            return list(self._values.get(node.input[1], ()))
        return list(get_attribute(node, "axes", ()))


def _shape(value: object) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim  # type: ignore[attr-defined]
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
