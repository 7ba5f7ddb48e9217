"""Which of timm's architectures can be pruned, told from timm's source: importing timm takes seconds, building all of
its models half a minute, and reading three files no time.

timm writes every architecture as a function with plain arguments (`patch_size=16, embed_dim=384, ...`). A family
supports an architecture when no argument changes the kind of its blocks; tests hold this list against `family_of` of
every model. How many parameters each has is counted once, and kept in `parameters.json`: `make catalogue`, after timm
has changed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, get_args

from upvits.toolchain.choices import Component

COUNTS = Path(__file__).with_name("parameters.json")
"""Parameters by name, with the classes and the image size that timm gives an architecture."""

MODULES = {"vit": ("vision_transformer", "deit"), "pvt_v2": ("pvt_v2",)}
"""timm modules whose models a family may support; single models in them can still be refused."""

_SIZES = {
    "vit": {
        "patch_size", "img_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "reg_tokens",
        "no_embed_class", "dynamic_img_size", "init_values", "pre_norm", "fc_norm", "final_norm", "qkv_bias",
        "act_layer", "distilled", "norm_layer", "global_pool",
    },
    "pvt_v2": {"depths", "embed_dims", "num_heads", "mlp_ratios", "linear"},
}  # fmt: skip
"""Arguments that leave blocks what the family knows; two of them depend on their value."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of timm's architectures; PVTv2 has a width and a depth per stage.

    Attributes:
        parameters: how many, as timm builds it; None of an architecture that is newer than the table.
        components: what can be cut.
    """

    name: str
    family: str
    parameters: int | None
    embed_dim: int | tuple[int, ...]
    depth: int | tuple[int, ...]
    components: tuple[Component, ...] = get_args(Component)


def architectures(pattern: str = "") -> Iterator[Architecture]:
    """The architectures that can be pruned and have `pattern` in their names, in timm's order."""
    counts = json.loads(COUNTS.read_text())
    for family, modules in MODULES.items():
        for module in modules:
            for name, args in sorted(_entries(module), key=lambda entry: _natural(entry[0])):
                if pattern in name and _is_supported(family, args):
                    width, depth = args.get("embed_dims", args.get("embed_dim")), args.get("depths", args.get("depth"))
                    yield Architecture(name, family, counts.get(name), width or 768, depth or 12)


def _entries(module: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of a module's architectures, and the arguments that they are built with; other values than plain ones as
    source text."""
    spec = PathFinder.find_spec("timm")  # does not import it, and tells nobody who watches imports
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "models" / f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and "register_model" in map(ast.unparse, node.decorator_list):
            yield node.name, _arguments(node)


def _arguments(function: ast.FunctionDef) -> dict[str, Any]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    built = [call for call in calls if re.match(r"dict$|_create_", ast.unparse(call.func))]
    given = {keyword.arg: keyword.value for call in built for keyword in call.keywords if keyword.arg}
    return {name: _value(node) for name, node in given.items() if name != "pretrained"}


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _is_supported(family: str, args: dict[str, Any]) -> bool:
    norm, pool = str(args.get("norm_layer", "LayerNorm")), args.get("global_pool", "token")
    return args.keys() <= _SIZES[family] and "LayerNorm" in norm and pool in ("token", "avg")


def _natural(name: str) -> list[int | str]:
    """Sorts numbers by their value, as timm does."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def count_all() -> dict[str, int]:
    """Parameters of every architecture that can be pruned, by name, from building each without memory."""
    import timm

    from upvits.toolchain.structure.macs import count_params
    from upvits.toolchain.structure.meta import on_meta

    with on_meta():
        return {one.name: count_params(timm.create_model(one.name)) for one in architectures()}


if __name__ == "__main__":
    COUNTS.write_text(json.dumps(count_all(), indent=2) + "\n")
