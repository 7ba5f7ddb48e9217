"""Names of nodes that people know: `blocks.3.mlp.fc1/MatMul` instead of `node_MatMul_52`.

PyTorch's exporter numbers nodes and notes in their metadata which module they come from. Names made of that survive in
every runtime and in what its profiler says, at least as a part of its own names (`module_of` finds them there).
"""

from __future__ import annotations

import ast
import re
from collections import Counter

from onnx import ModelProto, NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOT = "model"
_OURS = re.compile(r"(?<![\w./])([A-Za-z_][\w.]*)/[A-Z]\w*")
_SHOWN = 3


def name_after_modules(model: ModelProto) -> None:
    """Name the nodes of an exported graph after their modules, and what they compute after them.

    The n-th node of a kind in a module gets the same name in every network of the same structure, whatever its widths.
    Nodes that do not say where they come from belong to `model`. Graph inputs and outputs keep their names.
    """
    counted: Counter[str] = Counter()
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        name = f"{_module(node)}/{node.op_type}"
        counted[name] += 1
        node.name = name if counted[name] == 1 else f"{name}_{counted[name]}"
        for number, output in enumerate(node.output):
            if output and output not in kept:
                renamed[output] = f"{node.name}_out" if number == 0 else f"{node.name}_out{number}"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = renamed.get(name, name)
    for value in model.graph.value_info:
        value.name = renamed.get(value.name, value.name)


def module_of(name: str) -> str:
    """The modules that a layer of a runtime computes, by the names of nodes in its own; other names stay as they are.

    >>> module_of("blocks.3.mlp.fc1/MatMul_out_nchwc")
    'blocks.3.mlp.fc1'
    >>> module_of("blocks.0.norm1/LayerNormalization + blocks.0.attn.qkv/MatMul")
    'blocks.0.norm1 + blocks.0.attn.qkv'
    >>> module_of("node_MatMul_52")
    'node_MatMul_52'
    """
    modules = list(dict.fromkeys(_OURS.findall(name)))
    if not modules:
        return name
    more = f" + {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return " + ".join(modules[:_SHOWN]) + more


def _module(node: NodeProto) -> str:
    """Path of the module that a node comes from: the last but one of its scopes, which begin with the network's ''."""
    told = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    try:
        scopes = ast.literal_eval(told)
    except (ValueError, SyntaxError):
        return _ROOT
    known = isinstance(scopes, list) and len(scopes) > 1 and scopes[0] == ""
    return str(scopes[-2]) or _ROOT if known else _ROOT
