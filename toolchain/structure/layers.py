"""Rebuilding single layers at another width, through their own constructors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import LayerScale
from torch import nn


def resize_leaf(module: Any, shapes: Mapping[str, Sequence[int]]) -> Any:
    """A layer like `module` whose parameters have the given shapes (fresh values).

    Args:
        module: a Linear, Conv2d (dense or depthwise), LayerNorm or LayerScale.
        shapes: parameter name -> shape.
    """
    shape = shapes["gamma" if isinstance(module, LayerScale) else "weight"]
    if isinstance(module, nn.Linear):
        return type(module)(shape[1], shape[0], bias=module.bias is not None)
    if isinstance(module, nn.LayerNorm):
        # timm's LayerNorm has no `bias` argument, so it is passed only where it is needed
        return type(module)(shape[0], eps=module.eps, **({} if module.bias is not None else {"bias": False}))
    if isinstance(module, nn.Conv2d):
        groups = shape[0] if module.groups > 1 else 1
        geometry: dict[str, Any] = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding")}
        return type(module)(shape[1] * groups, shape[0], groups=groups, bias=module.bias is not None, **geometry)
    if isinstance(module, LayerScale):
        return LayerScale(shape[0], init_values=module.init_values, inplace=module.inplace)
    raise TypeError(f"no rule to resize {type(module).__name__}")


def adopt_parameters(module: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Give a narrowed module (meta parameters) its own copy of the weights; names and shapes must all agree."""
    module.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, strict=True, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def mlp_ratio(hidden: int, dim: int) -> float:
    """The ratio from which timm's `int(dim * mlp_ratio)` gives exactly `hidden`."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim
