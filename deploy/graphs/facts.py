"""What an ONNX graph asks of a runtime: matrix products by precision, and attention blocks.

Held against what a runtime made of the graph, these show an "int8" engine that is none, or attention left unfused.
"""

from collections.abc import Iterator

from onnx import ModelProto, NodeProto, TensorProto

from upvits.deploy.graphs.files import inferred_graph
from upvits.deploy.graphs.nodes import PRECISION_OF_TYPE

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
_RESHAPING = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear"})
# What may stand between the two matrix products of attention and its softmax: scale, mask, layout and type changes.
_PASSING = _RESHAPING | _QUANTIZING | {"Add", "Div", "Expand", "Mul", "Where"}


class GraphFacts:
    """An index of a graph's nodes by what they make and read. Subgraphs of control flow are not looked into.

    Types that cannot be inferred, as of operators of others, are unknown: such products count as "other".
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._nodes: list[NodeProto] = list(graph.node)
        self._makers: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        inferred = inferred_graph(model)
        values = (*graph.input, *graph.value_info, *graph.output, *inferred.value_info, *inferred.output)
        types = ((value.name, value.type.tensor_type.elem_type) for value in values)
        self._types = {name: known for name, known in types if known}
        self._types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._weights = {tensor.name for tensor in graph.initializer}

    def gemms(self) -> dict[str, int]:
        """Matrix products and convolutions with constant weights, by the precision that they are to run in."""
        counts: dict[str, int] = {}
        for precision in self.gemm_nodes().values():
            counts[precision] = counts.get(precision, 0) + 1
        return counts

    def gemm_nodes(self) -> dict[str, str]:
        """The same by node: precision ("fp32", "fp16", "bf16", "int8", "fp8" or "other") by its name.

        int8 and fp8 need both factors quantized: a layer with quantized weights alone multiplies in what its images
        are in.
        """
        return {
            node_name(node): self._precision(node)
            for node in self._nodes
            if node.op_type in _PRODUCTS and self._constant_factors(node) == 1
        }

    def in_fp32(self) -> tuple[str, ...]:
        """Kinds of nodes that compute in fp32, casts and quantization left out, in alphabetical order."""
        silent = ("Cast", "QuantizeLinear", "DequantizeLinear", "Constant")
        computing = (node for node in self._nodes if node.op_type not in silent and node.output)
        return tuple(sorted({n.op_type for n in computing if self._types.get(n.output[0]) == TensorProto.FLOAT}))

    def attention_blocks(self) -> int:
        """Softmaxes between two matrix products of activations, and Attention nodes."""
        return len(self.attention_nodes())

    def attention_nodes(self) -> tuple[str, ...]:
        """Names of these softmaxes and Attention nodes, in the order of the graph."""
        return tuple(
            node_name(node)
            for node in self._nodes
            if node.op_type == "Attention"
            or (node.op_type == "Softmax" and self._has_product(node, before=True) and self._has_product(node))
        )

    def _precision(self, node: NodeProto) -> str:
        factors = {self._quantized(name) for name in node.input[:2]}
        if len(factors) == 1 and None not in factors:
            return str(factors.pop())
        images = next((name for name in node.input[:2] if not self._is_weight(name)), "")
        return PRECISION_OF_TYPE.get(self._types.get(images, 0), "other")

    def _quantized(self, name: str) -> str | None:
        """Precision before the DequantizeLinear that a tensor comes from; None when it comes from none."""
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in _RESHAPING:
            maker = self._makers.get(maker.input[0])
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        return PRECISION_OF_TYPE.get(self._types.get(maker.input[0], 0), "other")

    def _constant_factors(self, node: NodeProto) -> int:
        return sum(self._is_weight(name) for name in node.input[:2])

    def _is_weight(self, name: str) -> bool:
        while name not in self._weights:
            maker = self._makers.get(name)
            if maker is None or maker.op_type not in _RESHAPING | _QUANTIZING:
                return maker is not None and maker.op_type == "Constant"
            name = maker.input[0]
        return True

    def _has_product(self, node: NodeProto, *, before: bool = False) -> bool:
        """Whether a product of activations is reached from a node, over nodes that may stand between the two."""
        neighbours = self._nodes_before if before else self._nodes_after
        pending, seen = list(neighbours(node)), set()
        while pending:
            reached = pending.pop()
            if reached.op_type == "MatMul" and self._constant_factors(reached) == 0:
                return True
            if reached.op_type in _PASSING and reached.output[0] not in seen:
                seen.add(reached.output[0])
                pending.extend(neighbours(reached))
        return False

    def _nodes_before(self, node: NodeProto) -> Iterator[NodeProto]:
        return (self._makers[name] for name in node.input if name in self._makers)

    def _nodes_after(self, node: NodeProto) -> Iterator[NodeProto]:
        return (reader for name in node.output for reader in self._readers.get(name, []))


def node_name(node: NodeProto) -> str:
    """Name of a node; without a name it is called after its first output, as NVIDIA's parser does it."""
    return node.name or f"node_of_{node.output[0]}"
