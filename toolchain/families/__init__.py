"""Model families: which timm architectures can be pruned, in one explicit table.

A family is a module of plain functions (see `Family`). To add one, write a file next to `vit.py` and add a line to
`FAMILIES`; the contract tests then run over it.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import pvt_v2, vit
from upvits.toolchain.structure.groups import ChannelGroup, Widths, narrowed_shapes
from upvits.toolchain.structure.layers import resize_leaf
from upvits.toolchain.structure.meta import on_meta
from upvits.toolchain.structure.segments import Segment


class Family(Protocol):
    """What the toolchain asks of a family. Each family is a module with these functions."""

    __name__: str

    def matches(self, model: nn.Module) -> bool:
        """Whether `model` is an instance of one of this family's timm classes."""

    def unsupported(self, model: nn.Module) -> str | None:
        """What in this model cannot be pruned (e.g. "gated MLPs"), or None."""

    def groups(self, model: nn.Module) -> tuple[ChannelGroup, ...]:
        """The prunable groups, with every parameter slice that they own."""

    def segments(self, model: nn.Module) -> tuple[Segment, ...]:
        """The forward pass in eval mode as a chain of functions; between blocks flows the residual stream."""

    def block_lists(self, model: nn.Module) -> dict[str, int]:
        """Lists of like blocks (`torch.nn` containers by name) and their lengths; blocks may leave each of them."""

    def attention(self, old: nn.Module, dim: int, num_heads: int, qk_dim: int, v_dim: int) -> nn.Module:
        """An attention module like `old` with other sizes (q·k and v dims per head); parameters keep timm's names."""

    def refresh(self, model: nn.Module) -> None:
        """Update the sizes that timm keeps as attributes of the model after submodules were replaced."""

    def constructor_args(self, model: nn.Module) -> dict[str, Any]:
        """timm arguments that describe how `model` was built, apart from its prunable widths."""

    def base_name(self, model: nn.Module) -> str:
        """timm's name of an architecture from which arguments make any model of this class, for those without one."""

    def variant_args(self, model: nn.Module) -> dict[str, Any]:
        """timm arguments that an architecture's name usually fixes, such as activation and size of patches."""

    def uniform_args(self, model: nn.Module) -> dict[str, Any] | None:
        """timm arguments for the widths of `model`, or None when stock timm cannot build them."""

    def wide_args(self, model: nn.Module) -> dict[str, Any]:
        """timm arguments of a network from which `model` can be cut, whatever its widths."""


FAMILIES: dict[str, Family] = {"vit": vit, "pvt_v2": pvt_v2}


def family_of(model: nn.Module) -> Family:
    """The family of a timm model.

    Raises:
        UserError: no family supports the model; says which part stands in the way.
    """
    for family in FAMILIES.values():
        if family.matches(model):
            reason = family.unsupported(model)
            if reason is None:
                return family
            raise UserError(
                f"This {type(model).__name__} cannot be pruned: it has {reason}.",
                why="Cutting channels there would change the function in ways that are not handled yet.",
                fix="Supported: timm VisionTransformer with standard attention and MLP (ViT, DeiT, DeiT-III, DINOv2, "
                "CLIP image towers) and PVTv2 (b0 to b5, b2_li). See `upvits-deploy models`.",
            )
    raise UserError(
        f"Models of type {type(model).__name__} are not supported.",
        why="Structured pruning needs to know which tensors belong together.",
        fix="Supported are timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP) and PVTv2. See `upvits-deploy models`.",
    )


def groups_of(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """All prunable groups of a timm model."""
    return family_of(model).groups(model)


def segments_of(model: nn.Module) -> tuple[Segment, ...]:
    """The forward pass of a timm model as a chain of functions."""
    return family_of(model).segments(model)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the network with its tensors on the meta device: structure without memory."""
    tensors = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    buffers = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, {**tensors, **buffers})  # the memo stands in for what would be copied


def narrow(model: nn.Module, widths: Widths) -> nn.Module:
    """The same architecture with other widths, its parameters on the meta device (no memory, no values).

    Submodules are rebuilt through their own constructors; nothing is patched and parameter names stay timm's. Load
    weights with `load_state_dict(..., strict=True, assign=True)`.
    """
    family = family_of(model)
    groups = family.groups(model)
    shapes = narrowed_shapes({name: tensor.shape for name, tensor in model.state_dict().items()}, groups, widths)
    result = skeleton(model)
    with on_meta():
        sizes = {group.name: group.size for group in groups} | widths.channels
        for group in groups:
            if group.kind == "qk":
                name, heads = group.module, widths.num_heads.get(group.module, group.num_heads)
                qk, v = (widths.channels.get(name, sizes[f"{name}.{part}"]) // heads for part in ("qk", "v"))
                dim = shapes[group.queries[0]][1]
                result.set_submodule(name, family.attention(result.get_submodule(name), dim, heads, qk, v))
        for name in {name.rpartition(".")[0] for name in shapes} - {""}:
            module = result.get_submodule(name)
            leaf_shapes = {key: shapes[f"{name}.{key}"] for key, _ in module.named_parameters(recurse=False)}
            if any(list(module.get_parameter(key).shape) != shape for key, shape in leaf_shapes.items()):
                result.set_submodule(name, resize_leaf(module, leaf_shapes))
        for key, _ in list(result.named_parameters(recurse=False)):
            setattr(result, key, nn.Parameter(torch.empty(shapes[key])))
    family.refresh(result)
    return result.train(model.training)
