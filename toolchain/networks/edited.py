"""timm objects that users built or edited, as timm itself would have built them: one linear layer as head, its classes
counted, a configuration where the constructor was called without one."""

from __future__ import annotations

import copy
import logging
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import FAMILIES
from upvits.toolchain.networks.settle import fitting_channels

_LOGGER = logging.getLogger(__name__)

_HEADS = ("head", "head_dist")


def as_timm_builds(model: nn.Module) -> nn.Module:
    """The same network with the head, number of classes and configuration that timm's own has.

    The result shares the tensors of `model`, which stays as it is.

    Args:
        model: a network of timm's classes; others come back as they are, for `family_of` to refuse.

    Raises:
        UserError: its head is more than one linear layer.
    """
    base = next((family.base_name(model) for family in FAMILIES.values() if family.matches(model)), None)
    if base is None:
        return model
    result = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for name in _HEADS:
        head = getattr(result, name, None)
        if isinstance(head, nn.Module):
            setattr(result, name, _plain_head(head))
    last = result.get_submodule("head")
    result.num_classes = last.out_features if isinstance(last, nn.Linear) else 0  # type: ignore[assignment]
    _configure(result, base)
    return result


def _plain_head(head: nn.Module) -> nn.Module:
    """A head as one linear layer with a bias, or none."""
    layers = [layer for layer in _flat(head) if not isinstance(layer, (nn.Dropout, nn.Identity))]
    if not layers:
        return nn.Identity()
    if len(layers) > 1 or not isinstance(layers[0], nn.Linear):
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise UserError(
            f"The head of this network is more than one linear layer: {kinds}.",
            why="timm's networks end in one linear layer, and a model folder holds what timm builds.",
            fix="Save the network without it (`model.head = torch.nn.Identity()`), and keep the head apart.",
        )
    linear: Any = layers[0]
    if linear.bias is not None:
        return layers[0]
    result = nn.Linear(linear.in_features, linear.out_features, device="meta")
    result.weight, result.bias = linear.weight, nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    return result


def _flat(head: nn.Module) -> list[nn.Module]:
    return [one for layer in head for one in _flat(layer)] if isinstance(head, nn.Sequential) else [head]


def _configure(model: nn.Module, base: str) -> None:
    """Give a network without a configuration that of its base, and any the channels that it really has."""
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    config = known if isinstance(known, dict) else known.to_dict()
    if not timm.is_model(str(config.get("architecture"))):
        config = {**PretrainedCfg().to_dict(), **config, "architecture": base}
        _LOGGER.warning(
            "The network says nothing of its architecture and its images: it is saved as a %s with arguments, and "
            "timm's usual normalisation is assumed. `model.pretrained_cfg` would say it.",
            base,
        )
    channels = int(model.get_submodule("patch_embed").get_parameter("proj.weight").shape[1])
    size = getattr(model.get_submodule("patch_embed"), "img_size", None) or config["input_size"][-2:]
    if model.num_classes != config.get("num_classes"):
        config = {**config, "label_names": _fitting(config.get("label_names"), model)}
    model.pretrained_cfg = fitting_channels({**config, "input_size": (channels, *size)}, channels)  # type: ignore[assignment]


def _fitting(names: Any, model: nn.Module) -> Any:
    return names if names is not None and len(names) == model.num_classes else None
