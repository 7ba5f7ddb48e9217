"""Checks of what is asked of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from calib_data.errors import UserError
from toolchain.checkpoints import weights_digest
from toolchain.groups import ChannelGroup
from toolchain.scores import Scores


def check_request(given: Mapping[str, float], align: int, components: Sequence[str]) -> None:
    """Refuse numbers out of range and components that do not go together.

    Args:
        given: one of ratio, target_macs, target_params.

    Raises:
        UserError: says what would be right.
    """
    for name, value in given.items():
        low_ok = 0 <= value < 1 if name == "ratio" else 0 < value <= 1
        if not (math.isfinite(value) and low_ok):
            wanted = "in [0, 1): the share to remove" if name == "ratio" else "in (0, 1]: the share to keep"
            raise UserError(f"{name} {value} is out of range.", fix=f"Give a number {wanted}.")
    if align < 1:
        raise UserError(f"align {align} is out of range.", fix="Give a whole number of at least 1; kernels like 8.")
    unknown = sorted(set(components) - {"embed", "attention", "heads", "ffn"})
    if unknown or not components or {"attention", "heads"} <= set(components):
        raise UserError(
            f"Cannot prune the components {', '.join(components) or '(none)'}.",
            fix="Give some of embed, ffn and one of attention (dims in every head) or heads (whole heads).",
        )


def check_scores(model: nn.Module, groups: Sequence[ChannelGroup], scores: Scores) -> None:
    if scores.model_digest != weights_digest(model):
        raise UserError(
            "These scores were measured on another network.",
            why="Importance belongs to exactly the weights that it was measured on.",
            fix="Score this network again (`upvits-deploy score`).",
        )
    for group in groups:
        if torch.isnan(scores.values[group.name]).any():
            raise UserError(
                f"The scores of {group.name} hold NaN.", fix="Measure all units; NaN marks unmeasured ones."
            )
