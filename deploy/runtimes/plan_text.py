"""The compiled graph inside a plan of TensorRT-RTX, read without a GPU.

The plan holds it as text: tensors with their types, then the kernels in order, each with the ONNX nodes in it. This
is no interface of NVIDIA's and may change with any version, so what cannot be read counts as unknown and never fails
a build; the tests do fail then. All targets share a graph.

Products that are fused with what follows are `runtime_fusion` kernels. Their small graphs (`accelerators={*}`) follow
the main graph.
"""

import re

from upvits.deploy.runtimes.kernels import Compiled, Kernel, onnx_nodes, op_of, widest

_SOURCE = "compiled graph in the plan"
# Up to the first byte that no text has; ONNX names may be UTF-8, and \x1c to \x1f separate them.
_GRAPH = re.compile(rb"header \{\n[\t\n\r\x1c-\x7e\x80-\xff]*")
_TENSOR = re.compile(r'^ *(?:sub_)?tensor=\{.* name="([^"]+)".* type=(\w+) \}$', re.MULTILINE)
_MAIN = re.compile(r"^main \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_STATEMENT = re.compile(r'^ *(\w+)=\{ name="?([^" ]+)"?(.*)\}$', re.MULTILINE)
_TENSORS_OF = re.compile(r'\b(input|output)(?:_args)?=\{((?: ?"[^"]*")*) ?\}')
_REGION = re.compile(r"^ *region = \{ .*size=(\d+) .*type=user place=accelerator", re.MULTILINE)
_ON_HOST = frozenset({"assert", "shape_call", "signal", "wait"})
_PRODUCTS = {"fully_connected": "MatMul", "corrltn": "Conv"}
_TYPES = {"float": "fp32", "half": "fp16", "bf16": "bf16", "int8": "int8", "fp8_e4m3": "fp8"}


def read_plan(plan: bytes | memoryview) -> Compiled | None:
    """The compiled graph of a plan; None when none can be read."""
    graphs = [match[0].decode("utf-8", "replace") for match in _GRAPH.finditer(plan)]
    statements = [(graph, *_statements(graph)) for graph in graphs]
    products: dict[str, str] = {}
    for _, types, listed in statements:
        for kind, _, text in listed:
            if kind in _PRODUCTS:
                for node in onnx_nodes(text):
                    products[node] = widest([products.get(node, ""), _product_precision(text, types)])
    kernels = tuple(
        _kernel(kind, name, text, types, products)
        for graph, types, listed in statements
        if "accelerators={*}" not in graph
        for kind, name, text in listed
        if kind not in _ON_HOST
    )
    if not kernels:
        return None
    memory = sum(int(size) for graph in graphs for size in _REGION.findall(graph))
    return Compiled(_SOURCE, kernels, products, memory)


def _statements(graph: str) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Precision by tensor, and kind, name and arguments of every statement of the main section."""
    types = {name: _TYPES[kind] for name, kind in _TENSOR.findall(graph) if kind in _TYPES}
    main = _MAIN.search(graph)
    return types, _STATEMENT.findall(main[1]) if main is not None else []


def _product_precision(text: str, types: dict[str, str]) -> str:
    factors = _tensors(text, "input")[:2]
    return widest(types[name] for name in factors if name in types)


def _kernel(kind: str, name: str, text: str, types: dict[str, str], products: dict[str, str]) -> Kernel:
    nodes = onnx_nodes(text)
    if kind in _PRODUCTS:
        return Kernel(name, _PRODUCTS[kind], _product_precision(text, types), nodes)
    if kind == "runtime_fusion":
        op = "Conv" if "backbone=conv" in text else "MatMul"
        return Kernel(name, op, widest(products[node] for node in nodes if node in products), nodes)
    tensors = [*_tensors(text, "input"), *_tensors(text, "output")]
    return Kernel(name, op_of(name), widest(types[tensor] for tensor in tensors if tensor in types), nodes)


def _tensors(text: str, direction: str) -> list[str]:
    return [name for role, names in _TENSORS_OF.findall(text) if role == direction for name in names.split('"')[1::2]]
