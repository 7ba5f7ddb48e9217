"""Surgery on ONNX graphs: names, preprocessing inside the graph, rewrites that runtimes like.

The functions on graphs change the `onnx_graphsurgeon.Graph` it is given. They match only what they
fully understand and leave everything else as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

PREPROCESS = "preprocess_"  # start of the names of nodes that turn uint8 pixels into the model's input

_UNARY = frozenset({"Gelu", "Relu", "Sigmoid", "Tanh", "HardSwish", "Identity"})
_CHANNELS_LAST_TO_FIRST = [0, 2, 1]


def rename_outputs(graph: gs.Graph, names: Sequence[str]) -> None:
    """Give the graph's outputs these names, in order. Another tensor of the same name gets out of the way."""
    for output, name in zip(graph.outputs, names, strict=True):
        _free_name(graph, name, output)
        output.name = name


def rename_input(graph: gs.Graph, name: str) -> None:
    """Give the only input of the graph this name."""
    _free_name(graph, name, graph.inputs[0])
    graph.inputs[0].name = name


def name_batch_axis(graph: gs.Graph, name: str = "batch") -> None:
    """Name axis 0 of every input and output, which must be dynamic (a frozen batch raises ValueError)."""
    for tensor in [*graph.inputs, *graph.outputs]:
        if not tensor.shape or isinstance(tensor.shape[0], int):
            raise ValueError(f"axis 0 of {tensor.name} is fixed: shape {tensor.shape}")
        tensor.shape = [name, *tensor.shape[1:]]


def add_uint8_input(graph: gs.Graph, mean: Sequence[float], std: Sequence[float], name: str = "pixels") -> None:
    """Replace the float NCHW input by a uint8 NHWC input; cast, normalisation and transpose become graph nodes.

    `mean` and `std` are per channel for pixels scaled to 0..1, as timm writes them. The cast comes first because
    TensorRT accepts uint8 tensors only as network inputs that are cast at once.
    """
    images = graph.inputs[0]
    batch, channels, height, width = images.shape
    _free_name(graph, name, images)
    pixels = gs.Variable(name, dtype=np.dtype(np.uint8), shape=[batch, height, width, channels])
    deviation = 255.0 * np.asarray(std, np.float64)
    scale = gs.Constant(f"{PREPROCESS}scale", (1.0 / deviation).astype(np.float32))
    shift = gs.Constant(
        f"{PREPROCESS}shift", (-np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32)
    )
    as_float, scaled, shifted = (_variable(f"{PREPROCESS}{step}_out") for step in ("cast", "scale", "shift"))
    graph.nodes = [
        gs.Node("Cast", f"{PREPROCESS}cast", {"to": int(onnx.TensorProto.FLOAT)}, [pixels], [as_float]),
        gs.Node("Mul", f"{PREPROCESS}scale", {}, [as_float, scale], [scaled]),
        gs.Node("Add", f"{PREPROCESS}shift", {}, [scaled, shift], [shifted]),
        gs.Node("Transpose", f"{PREPROCESS}transpose", {"perm": [0, 3, 1, 2]}, [shifted], [images]),
        *graph.nodes,
    ]
    graph.inputs = [pixels]


@dataclass(frozen=True, slots=True)
class _Linear:
    """MatMul with a constant matrix [in, out], and the Add of its bias, if it has a bias."""

    matmul: gs.Node
    weight: np.ndarray
    bias: np.ndarray | None
    source: gs.Tensor
    result: gs.Tensor

    def as_conv(self, source: gs.Tensor, result: gs.Tensor) -> gs.Node:
        """The same layer as a 1x1 convolution on [batch, channels, height, width]."""
        name = self.matmul.name
        kernel = np.ascontiguousarray(self.weight.T)[:, :, None, None]
        inputs = [source, gs.Constant(f"{name}_kernel", kernel)]
        if self.bias is not None:
            inputs.append(gs.Constant(f"{name}_bias", self.bias))
        attributes = {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1}
        return gs.Node("Conv", f"{name.removesuffix('/MatMul')}/Conv", attributes, inputs, [result])


@dataclass(frozen=True, slots=True)
class _Ffn:
    """fc1 -> Transpose -> Reshape -> (activation) -> depthwise Conv -> Reshape -> Transpose -> activation -> fc2."""

    fc1: _Linear
    to_channels_first: gs.Node
    to_image: gs.Node
    inner: list[gs.Node]  # what runs on [batch, hidden, height, width] already, the depthwise convolution last
    to_tokens: gs.Node
    to_channels_last: gs.Node
    activations: list[gs.Node]
    fc2: _Linear


def ffn_to_channels_first(graph: gs.Graph) -> int:
    """Run PVTv2's feed-forward networks on [batch, channels, height, width] from end to end; returns how many.

    timm computes fc1 and fc2 on tokens [batch, height * width, channels] and transposes to an image and back, at the
    hidden width, for the depthwise convolution between them. Those transposes dominate on CPUs. With fc1 and fc2 as 1x1
    convolutions the transposes are left at the stage width, four to eight times narrower: PVTv2-B0 at 64 pixels,
    batch 8, ONNX Runtime on 2 cores, smallest of 140 calls, takes 19.2 ms before and 14.7 ms after, half as wide 8.6
    and 6.5 ms; TensorRT-RTX makes 80 kernels of it instead of 94 (fp16). The result is the same up to the order
    of summation.
    """
    protected = {id(tensor) for tensor in graph.outputs}
    ffns = [ffn for node in graph.nodes if (ffn := _match_ffn(node, protected)) is not None]
    for ffn in ffns:
        _rewrite_ffn(graph, ffn)
    if ffns:
        graph.cleanup().toposort()
    return len(ffns)


def _match_ffn(conv: gs.Node, protected: set[int]) -> _Ffn | None:
    """The whole pattern around a depthwise convolution, or None when any part of it differs."""
    if conv.op != "Conv" or conv.attrs.get("group", 1) < 2 or not isinstance(conv.inputs[1], gs.Constant):
        return None
    hidden = conv.inputs[1].values.shape[0]
    if conv.attrs["group"] != hidden or conv.inputs[1].values.shape[1] != 1:
        return None
    inner = [conv]
    while (before := _producer(inner[0].inputs[0], protected)) is not None and before.op in _UNARY:
        inner.insert(0, before)
    to_image, to_tokens = before, _consumer(conv.outputs[0], protected)
    if to_image is None or not _reshapes(to_image, rank=4, channels=hidden):
        return None
    if to_tokens is None or not _reshapes(to_tokens, rank=3, channels=hidden):
        return None
    to_channels_first = _producer(to_image.inputs[0], protected)
    to_channels_last = _consumer(to_tokens.outputs[0], protected)
    if to_channels_first is None or not _swaps_tokens_and_channels(to_channels_first):
        return None
    if to_channels_last is None or not _swaps_tokens_and_channels(to_channels_last):
        return None
    activations: list[gs.Node] = []
    after = _consumer(to_channels_last.outputs[0], protected)
    while after is not None and after.op in _UNARY:
        activations.append(after)
        after = _consumer(after.outputs[0], protected)
    fc1 = _linear_ending(_producer(to_channels_first.inputs[0], protected), protected)
    fc2 = _linear_starting(after, protected)
    if fc1 is None or fc2 is None or fc1.weight.shape[1] != hidden or fc2.weight.shape[0] != hidden:
        return None
    return _Ffn(fc1, to_channels_first, to_image, inner, to_tokens, to_channels_last, activations, fc2)


def _rewrite_ffn(graph: gs.Graph, ffn: _Ffn) -> None:
    name = ffn.fc1.matmul.name
    result, conv = ffn.fc2.result, ffn.inner[-1]
    producer = result.inputs[0]
    producer.outputs.clear()

    _resize_channels(ffn.to_image, ffn.fc1.weight.shape[0])
    ffn.to_channels_first.inputs[0] = ffn.fc1.source
    ffn.to_channels_first.outputs = [_variable(f"{name}_narrow")]
    ffn.to_image.inputs[0] = ffn.to_channels_first.outputs[0]
    ffn.to_image.outputs = [_variable(f"{name}_image")]
    hidden = _variable(f"{name}_hidden")
    graph.nodes.append(ffn.fc1.as_conv(ffn.to_image.outputs[0], hidden))
    ffn.inner[0].inputs[0] = hidden

    last = conv.outputs[0]
    for node in ffn.activations:
        node.inputs[0] = last
        last = _variable(f"{node.name}_image")
        node.outputs = [last]
    narrow = _variable(f"{ffn.fc2.matmul.name}_result")
    graph.nodes.append(ffn.fc2.as_conv(last, narrow))
    _resize_channels(ffn.to_tokens, ffn.fc2.weight.shape[1])
    ffn.to_tokens.inputs[0] = narrow
    ffn.to_tokens.outputs = [_variable(f"{ffn.fc2.matmul.name}_tokens")]
    ffn.to_channels_last.inputs[0] = ffn.to_tokens.outputs[0]
    ffn.to_channels_last.outputs = [result]


def _producer(tensor: gs.Tensor, protected: set[int]) -> gs.Node | None:
    """The node that made a tensor which nothing else reads."""
    if (
        isinstance(tensor, gs.Constant)
        or len(tensor.inputs) != 1
        or len(tensor.outputs) != 1
        or id(tensor) in protected
    ):
        return None
    return tensor.inputs[0]


def _consumer(tensor: gs.Tensor, protected: set[int]) -> gs.Node | None:
    """The only reader of a tensor, which must take it as its first input."""
    if len(tensor.outputs) != 1 or id(tensor) in protected or tensor.outputs[0].inputs[0] is not tensor:
        return None
    return tensor.outputs[0]


def _reshapes(node: gs.Node, *, rank: int, channels: int) -> bool:
    if node.op != "Reshape" or not isinstance(node.inputs[1], gs.Constant):
        return False
    shape = node.inputs[1].values
    return len(shape) == rank and int(shape[1]) == channels and all(int(size) > 0 for size in shape[2:])


def _resize_channels(reshape: gs.Node, channels: int) -> None:
    shape = reshape.inputs[1].values.copy()
    shape[1] = channels
    reshape.inputs[1] = gs.Constant(f"{reshape.name}_shape", shape)


def _swaps_tokens_and_channels(node: gs.Node) -> bool:
    return node.op == "Transpose" and list(node.attrs.get("perm", ())) == _CHANNELS_LAST_TO_FIRST


def _weight_and_bias(matmul: gs.Node, add: gs.Node | None) -> tuple[np.ndarray, np.ndarray | None] | None:
    if matmul.op != "MatMul" or not isinstance(matmul.inputs[1], gs.Constant) or matmul.inputs[1].values.ndim != 2:
        return None
    weight = matmul.inputs[1].values
    if add is None:
        return weight, None
    constants = [tensor.values for tensor in add.inputs if isinstance(tensor, gs.Constant)]
    if len(constants) != 1 or constants[0].shape != (weight.shape[1],):
        return None
    return weight, constants[0]


def _linear_ending(node: gs.Node | None, protected: set[int]) -> _Linear | None:
    """The linear layer whose last node is this MatMul or bias Add."""
    if node is None:
        return None
    if node.op == "MatMul":
        matmul, add = node, None
    elif node.op == "Add":
        made = [_producer(tensor, protected) for tensor in node.inputs]
        products = [producer for producer in made if producer is not None and producer.op == "MatMul"]
        if len(products) != 1:
            return None
        matmul, add = products[0], node
    else:
        return None
    parts = _weight_and_bias(matmul, add)
    return parts and _Linear(matmul, *parts, matmul.inputs[0], node.outputs[0])


def _linear_starting(node: gs.Node | None, protected: set[int]) -> _Linear | None:
    """The linear layer whose first node is this MatMul; the Add after it belongs to it only when it adds a bias."""
    if node is None or node.op != "MatMul":
        return None
    product = node.outputs[0]
    readers = product.outputs
    add = readers[0] if len(readers) == 1 and readers[0].op == "Add" and id(product) not in protected else None
    with_bias = _weight_and_bias(node, add) if add is not None else None
    if add is not None and with_bias is not None and with_bias[1] is not None:
        return _Linear(node, *with_bias, node.inputs[0], add.outputs[0])
    parts = _weight_and_bias(node, None)
    return parts and _Linear(node, *parts, node.inputs[0], product)


def _variable(name: str) -> gs.Variable:
    return gs.Variable(name, dtype=np.dtype(np.float32))


def _free_name(graph: gs.Graph, name: str, owner: gs.Tensor) -> None:
    other = graph.tensors().get(name)
    if other is not None and other is not owner:
        other.name = f"{name}_inner"
