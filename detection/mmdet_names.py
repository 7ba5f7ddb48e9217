"""PVTv2 weights in timm's names and in those of mmdet's own `PyramidVisionTransformerV2`, both ways.

mmdet computes the same network from other modules: 1x1 convolutions for the FFN's linear layers, and torch's
`MultiheadAttention`, whose queries, keys and values share one matrix. So a uniform network also loads in stock mmdet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import family_of, groups_of

_MODULES = (  # timm's names and mmdet's; %d are the stage and the block
    (r"patch_embed\.proj", "layers.0.0.projection"),
    (r"patch_embed\.norm", "layers.0.0.norm"),
    (r"stages\.(\d+)\.downsample\.proj", r"layers.\1.0.projection"),
    (r"stages\.(\d+)\.downsample\.norm", r"layers.\1.0.norm"),
    (r"stages\.(\d+)\.norm", r"layers.\1.2"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.(norm[12])", r"layers.\1.1.\2.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.attn\.(sr|norm)", r"layers.\1.1.\2.attn.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.attn\.proj", r"layers.\1.1.\2.attn.attn.out_proj"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc1", r"layers.\1.1.\2.ffn.layers.0"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.dwconv", r"layers.\1.1.\2.ffn.layers.1"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc2", r"layers.\1.1.\2.ffn.layers.4"),
)


def to_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A PVTv2's weights in timm's names, without those of a head, in mmdet's names and shapes.

    Raises:
        UserError: a name is none of a PVTv2's.
    """
    result = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            continue
        module, _, kind = name.rpartition(".")
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.attn\.(q|kv)", module):
            if match[3] == "q":
                keys = state[f"{module.removesuffix('.q')}.kv.{kind}"]
                result[f"layers.{match[1]}.1.{match[2]}.attn.attn.in_proj_{kind}"] = torch.cat([tensor, keys])
            continue
        is_matrix = re.search(r"\.mlp\.fc[12]$", module) and kind == "weight"
        result[f"{_renamed(module)}.{kind}"] = tensor[:, :, None, None] if is_matrix else tensor
    return result


def _renamed(module: str) -> str:
    for pattern, other in _MODULES:
        if re.fullmatch(pattern, module):
            return re.sub(pattern, other, module)
    raise UserError(f"{module} is no part of a PVTv2.", fix="Give the weights of a timm PVTv2.")


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mmdet's weights in timm's names and shapes; names that begin with `backbone.` may be those of a whole detector.

    Raises:
        UserError: a name is none of mmdet's PVTv2.
    """
    if any(name.startswith("backbone.") for name in state):
        return from_mmdet({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")})
    result = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"layers\.(\d+)\.1\.(\d+)\.attn\.attn\.in_proj_(weight|bias)", name):
            width = len(tensor) // 3
            attention = f"stages.{match[1]}.blocks.{match[2]}.attn"
            result[f"{attention}.q.{match[3]}"] = tensor[:width]
            result[f"{attention}.kv.{match[3]}"] = tensor[width:]
            continue
        module, _, kind = name.rpartition(".")
        timm_name = _named_by_timm(module)
        is_matrix = re.search(r"\.mlp\.fc[12]$", timm_name) and kind == "weight"
        result[f"{timm_name}.{kind}"] = tensor.flatten(1) if is_matrix else tensor
    return result


def _named_by_timm(module: str) -> str:
    if match := re.fullmatch(r"layers\.(\d+)\.0\.(projection|norm)", module):
        part = "proj" if match[2] == "projection" else "norm"
        return f"patch_embed.{part}" if match[1] == "0" else f"stages.{match[1]}.downsample.{part}"
    if match := re.fullmatch(r"layers\.(\d+)\.2", module):
        return f"stages.{match[1]}.norm"
    if match := re.fullmatch(r"layers\.(\d+)\.1\.(\d+)\.(.+)", module):
        parts = {"attn.attn.out_proj": "attn.proj", "ffn.layers.0": "mlp.fc1", "ffn.layers.1": "mlp.dwconv",
                 "ffn.layers.4": "mlp.fc2"}  # fmt: skip
        return f"stages.{match[1]}.blocks.{match[2]}.{parts.get(match[3], match[3])}"
    raise UserError(f"{module} is no part of mmdet's PVTv2.", fix="Give weights of PyramidVisionTransformerV2.")


def stock_arguments(model: nn.Module) -> dict[str, object]:
    """The arguments with which mmdet's `PyramidVisionTransformerV2` builds this network.

    Raises:
        UserError: mmdet cannot build it: its widths differ within a stage, or heads are not as wide in every stage.
    """
    groups = groups_of(model)
    stages: dict[int | str | None, dict[str, set[int]]] = {}
    for group in groups:
        if group.kind in ("embed", "ffn", "qk", "v"):
            sizes = stages.setdefault(group.stage, {})
            sizes.setdefault(group.kind, set()).add(group.size)
            if group.kind == "qk":
                sizes.setdefault("heads", set()).add(group.num_heads)
    widths = [{kind: next(iter(values)) for kind, values in sizes.items()} for sizes in stages.values()]
    base = {width["embed"] // width["heads"] for width in widths}
    alike = all(len(values) == 1 for sizes in stages.values() for values in sizes.values())
    fills = all(w["qk"] == w["v"] == w["embed"] and w["ffn"] % w["embed"] == 0 for w in widths)
    if not (alike and fills and len(base) == 1):
        raise UserError(
            "Stock mmdet cannot build this backbone.",
            why="Its PVTv2 has one width per stage, a multiple of the heads, which attention fills.",
            fix='Use the backbone UPPVTv2, or a uniform plan (`planner="uniform"`, '
            '`components=("embed", "attention", "ffn")`).',
        )
    return {
        "embed_dims": base.pop(),
        "num_layers": list(family_of(model).block_lists(model).values()),
        "num_heads": [width["heads"] for width in widths],
        "mlp_ratios": [width["ffn"] // width["embed"] for width in widths],
    }
