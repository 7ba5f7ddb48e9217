"""What NVIDIA's compilers made of a graph: kernels, and which matrix products run in which precision.

Two sources say it: on machines with a GPU the engine inspector (`inspector.py`), on others the compiled graph inside a
plan of TensorRT-RTX (`plan_text.py`). Both name the ONNX nodes that went into a kernel.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.runtimes.interface import Built

PRODUCT_OPS = ("MatMul", "Conv")
REMOVED = "removed"
"""In `Built.gemms`: products of the graph that no kernel knows, because their result is constant or unused."""

_NARROW_TO_WIDE = ("int8", "fp8", "fp16", "bf16", "fp32")
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# Names of generated kernels are lists of operations, cut to three or four letters: __myl_CastReshTran_0x12ab.
_GENERATED = re.compile(r"__myl_([A-Za-z]+)")
# _gemm_mha_v2, __mye8037_gemm_mha_v2, fmha_v2 and the like, but not an ONNX node /encoder/mha/key
_FUSED_ATTENTION = re.compile(r"(?:_|mye\d+|gemm|gemv|fused|f)*mha")
_MOVES = frozenset({"Con", "Mov", "Rep", "Res", "Sli", "Tra"})


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel or layer of an engine.

    Attributes:
        op: "MatMul", "Conv", "attention", "LayerNormalization", "Softmax", "cast", "reformat" or "elementwise".
        precision: what it computes in.
        nodes: names of the ONNX nodes in it.
        bytes: what it reads and writes; None where that is not known.
    """

    name: str
    op: str
    precision: str
    nodes: tuple[str, ...]
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled graph.

    Attributes:
        source: where it was read.
        kernels: in the order of execution.
        products: precision of matrix products and convolutions by ONNX node.
        memory_bytes: scratch memory for activations at the largest batch.
    """

    source: str
    kernels: tuple[Kernel, ...]
    products: Mapping[str, str]
    memory_bytes: int | None


def built_from(compiled: Compiled | None, facts: GraphFacts) -> Built | None:
    """Count what was made of a graph; None when that could not be read or the kernels name none of its nodes."""
    if compiled is None:
        return None
    planned = facts.gemm_nodes()
    mentioned = {node for kernel in compiled.kernels for node in kernel.nodes} | set(compiled.products)
    if planned and mentioned.isdisjoint(planned):
        return None
    fused = {node for kernel in compiled.kernels if kernel.op == "attention" for node in kernel.nodes}
    attention = facts.attention_nodes()
    ops = Counter(kernel.op for kernel in compiled.kernels)
    return Built(
        source=compiled.source,
        layers=len(compiled.kernels),
        by_precision=dict(Counter(kernel.precision for kernel in compiled.kernels)),
        gemms=dict(Counter(_precision_of(node, compiled) for node in planned)),
        planned=facts.gemms(),
        attention_blocks=len(attention),
        attention_fused=sum(node in fused for node in attention),
        casts=ops["cast"],
        reformats=ops["reformat"],
        memory_bytes=compiled.memory_bytes,
    )


def _precision_of(node: str, compiled: Compiled) -> str:
    if node in compiled.products:
        return compiled.products[node]
    # a small product may be part of a generated kernel
    return widest((kernel.precision for kernel in compiled.kernels if node in kernel.nodes), REMOVED)


def widest(precisions: Iterable[str], otherwise: str = "other") -> str:
    """The widest of several precisions."""
    known = [precision for precision in precisions if precision in _NARROW_TO_WIDE]
    return max(known, key=_NARROW_TO_WIDE.index, default=otherwise)


def onnx_nodes(text: str) -> tuple[str, ...]:
    """ONNX nodes in a list such as "[ONNX Layer: a][ONNX Layer: b]", whatever separates them."""
    return tuple(dict.fromkeys(_LAYER.findall(text)))


def op_of(name: str) -> str:
    """What a kernel that is no product does, by its name."""
    if _FUSED_ATTENTION.match(name):
        return "attention"
    generated = _GENERATED.search(name)
    if generated is None:
        return "reformat" if "Reformatting" in name else "elementwise"
    steps = {step[:3] for step in re.findall(r"[A-Z][a-z]*", generated[1])}
    if steps <= _MOVES:
        return "reformat"
    if steps <= {*_MOVES, "Cas"}:
        return "cast"
    if "Exp" in steps:
        return "Softmax"
    return "LayerNormalization" if steps & {"Mea", "Sqr"} else "elementwise"
