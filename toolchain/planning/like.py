"""The widths of a smaller published model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from calib_data.errors import UserError
from toolchain.families import family_of, narrow
from toolchain.groups import ChannelGroup, Widths, widths_of
from toolchain.timm_config import architecture_of


def widths_like(model: nn.Module, groups: Sequence[ChannelGroup], like: nn.Module) -> Widths:
    """The widths of a smaller published model, checked to be reachable by removing and merging."""
    name = architecture_of(like)
    if family_of(like) is not family_of(model):
        raise UserError(f"{name} is of another family.", fix="Name a smaller model of the same family.")
    target = {group.name: group for group in family_of(like).groups(like)}
    if set(target) != {group.name for group in groups}:
        raise UserError(
            f"{name} has another depth or other parts than this network.",
            why="Widths and heads can be taken over; blocks can't be removed yet.",
            fix="Name a model of the same depth, e.g. deit_tiny for deit_small or deit_base, pvtv2_b0 for pvtv2_b1.",
        )
    for group in groups:
        other = target[group.name]
        if other.size > group.size or group.num_heads % other.num_heads:
            raise UserError(
                f"{name} does not fit into this network: {group.name} has {other.size} units there ({other.num_heads} "
                f"heads) and {group.size} here ({group.num_heads} heads).",
                fix="Name a model that is smaller everywhere and whose number of heads divides this one's.",
            )
    widths = widths_of(tuple(target.values()))
    here, there = (
        {name: tensor.shape for name, tensor in m.state_dict().items()} for m in (narrow(model, widths), like)
    )
    if here != there:
        differing = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        raise UserError(
            f"{name} has other parts than this network: {', '.join(differing[:4])} differ even at its widths.",
            why="Widths and heads can be taken over; tokens, patch size and layer scales cannot.",
            fix="Name a smaller model of the same kind.",
        )
    return widths
