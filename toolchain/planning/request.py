"""Checks of what is asked of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.choices import Component, Planner
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import ChannelGroup

_ATTENTION = {"attention", "heads", "qk_v"}


def check_request(
    given: Mapping[str, float], align: int, components: Sequence[str], planner: Planner = "uniform"
) -> None:
    """Refuse numbers out of range and components that do not go together.

    Args:
        given: ratio, depth_ratio, target_macs or target_params.

    Raises:
        UserError: says what would be right.
    """
    for name, value in given.items():
        low_ok = 0 <= value < 1 if name.endswith("ratio") else 0 < value <= 1
        if not (math.isfinite(value) and low_ok):
            valid = "in [0, 1): the share to remove" if name.endswith("ratio") else "in (0, 1]: the share to keep"
            raise UserError(f"{name} {value} is out of range.", fix=f"Give a number {valid}.")
    if planner not in get_args(Planner):
        raise UserError(f"Unknown planner {planner!r}.", fix=f"Choose one of: {', '.join(get_args(Planner))}.")
    if align < 1:
        raise UserError(f"align {align} is out of range.", fix="Give a whole number of at least 1; kernels like 8.")
    unknown = set(components) - set(get_args(Component))
    twice = len(set(components)) < len(components)
    if unknown or twice or not components or len(_ATTENTION & set(components)) > 1:
        raise UserError(
            f"Cannot prune the components {', '.join(components) or '(none)'}.",
            fix="Give some of embed, ffn, depth (planner global only) and one of attention (dims in every head), "
            "qk_v (q·k and v dims of their own) or heads (whole heads), each once.",
        )
    if set(components) == {"depth"} and "ratio" in given:
        raise UserError(
            "A ratio is a share of widths, and the only component is depth.",
            fix="Give depth_ratio, or with the planner global a target of MACs or parameters.",
        )
    if "depth" in components and planner != "global":
        raise UserError(
            "Only the global planner chooses how many blocks leave.",
            fix="Give depth_ratio, the share of blocks to remove, or planner global.",
        )


def groups_to_cut(groups: Sequence[ChannelGroup], components: Sequence[Component]) -> tuple[ChannelGroup, ...]:
    """The groups that the components name, each tensor once.

    Raises:
        UserError: whole heads are to leave where q·k and v dims differ.
    """
    coupled = {group.name for group in groups if group.kind == "attention"}
    uneven = any(group.kind == "qk" and group.module not in coupled for group in groups)
    if "heads" in components and uneven:
        raise UserError(
            "Whole heads cannot be removed from a network whose q·k and v dims differ.",
            fix="Prune the component qk_v instead of heads.",
        )

    def named(group: ChannelGroup) -> bool:
        if group.kind in ("qk", "v"):
            return "qk_v" in components or ("attention" in components and group.module not in coupled)
        return group.kind in components

    return tuple(group for group in groups if named(group))


def check_scores(model: nn.Module, groups: Sequence[ChannelGroup], scores: Scores) -> None:
    """Refuse scores that do not tell the units of these groups apart.

    Raises:
        UserError: they are of another network, lack a group or hold NaN.
    """
    if scores.model_digest != weights_digest(model):
        raise UserError(
            "These scores were measured on another network.",
            why="Importance belongs to exactly the weights that it was measured on.",
            fix="Score this network again.",
        )
    for group in groups:
        if group.name not in scores.values or len(scores.values[group.name]) != group.size:
            raise UserError(
                f"These scores have nothing on {group.name} with {group.size} units.",
                fix="Score this network again.",
            )
        if not torch.isfinite(scores.values[group.name]).all():
            raise UserError(
                f"The scores of {group.name} hold NaN or infinity.", fix="Measure all units; NaN marks unmeasured ones."
            )
