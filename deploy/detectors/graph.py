"""The two parts of a detector's graph: the network, up to the levels of its head, and what decodes boxes from them.

Precisions concern the network alone: boxes are decoded in fp32, since fp16 cannot tell pixels above 2048 apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import ModelProto
from onnx.utils import Extractor

LEVELS = 5
LEVEL_OUTPUTS = tuple(f"{kind}_{level}" for kind in ("logits", "deltas") for level in range(LEVELS))
BOX_OUTPUTS = ("boxes", "scores", "labels")


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """The part of a graph that these of its outputs need; its other outputs stay as inner tensors with their names."""
    result = ModelProto()
    result.CopyFrom(model)
    outputs = {value.name: value for value in result.graph.output}
    inner = [value for name, value in outputs.items() if name not in names]
    del result.graph.output[:]
    result.graph.output.extend(outputs[name] for name in names)
    needed, nodes = set(names), []
    for node in reversed(result.graph.node):
        if needed & {*node.output}:
            nodes.append(node)
            needed |= {*node.input}
    _keep_nodes(result, nodes[::-1])
    made = {name for node in nodes for name in node.output}
    result.graph.value_info.extend(value for value in inner if value.name in made)
    return result


def network_of(model: ModelProto) -> ModelProto:
    """From images to the levels: the part of a decoding graph that precisions concern."""
    inner = {value.name: value for value in model.graph.value_info}
    widened = ModelProto()
    widened.CopyFrom(model)
    widened.graph.output.extend(inner[name] for name in LEVEL_OUTPUTS)
    return with_outputs(widened, LEVEL_OUTPUTS)


def with_network(model: ModelProto, network: ModelProto) -> ModelProto:
    """A decoding graph whose network is replaced by this one, `network_of` it in another precision."""
    tail: ModelProto = Extractor(model).extract_model(list(LEVEL_OUTPUTS), [value.name for value in model.graph.output])
    result = ModelProto()
    result.CopyFrom(network)
    result.metadata_props.clear()
    result.metadata_props.extend(model.metadata_props)
    known = {tensor.name for tensor in network.graph.initializer}
    result.graph.node.extend(tail.graph.node)
    result.graph.initializer.extend(tensor for tensor in tail.graph.initializer if tensor.name not in known)
    result.graph.value_info.extend(result.graph.output)
    result.graph.value_info.extend(tail.graph.value_info)
    del result.graph.output[:]
    result.graph.output.extend(model.graph.output)
    onnx.checker.check_model(result)
    return result


def _keep_nodes(model: ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Only these nodes, and the weights and shapes of what they touch."""
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    touched = {name for node in kept for name in (*node.input, *node.output)}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in touched]
    shapes = [value for value in model.graph.value_info if value.name in touched]
    for field, values in (("node", kept), ("initializer", weights), ("value_info", shapes)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(copies)
