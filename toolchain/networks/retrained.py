"""Weights of a network of ours that were trained elsewhere, and come back."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.explain import ambiguous, faults
from upvits.toolchain.networks.readings import fitted, preferred, readings, same_tensors
from upvits.toolchain.networks.weight_files import as_fp32, read_weights
from upvits.toolchain.structure.layers import adopt_parameters


def with_weights(model: nn.Module, path: Path) -> nn.Module:
    """A copy of a network with other weights, in eval mode on the CPU; its widths, and all else, stay.

    Args:
        model: the network that was trained elsewhere; it is not changed.
        path: a checkpoint file, an index of shards, or a folder with one of them.

    Raises:
        UserError: the file cannot be read, holds another network, several of them, or NaN.
    """
    weights = read_weights(path)
    tried = [(reading, fitted(reading, model)) for reading in readings(weights.states, model)]
    fitting = [(reading, fit) for reading, fit in tried if fit.exact]
    if not fitting:
        wrong = min((faults(fit) for _, fit in tried), key=len, default="no tensor is called as those of this network")
        raise UserError(
            f"{path} holds another network than the pruned one: {wrong}.",
            why="Weights that are brought back must have the widths of the plan, tensor by tensor.",
            fix="Train the network in the run's 2-prune/model (upvits.load reads it) and give what that training "
            "saved, or cut anew with the settings that it was cut with.",
        )
    reading, fit = fitting[0]
    if any(not same_tensors(other.state, reading.state) for other, _ in fitting[1:]):
        best = preferred([one for one, _ in fitting])
        if best is None:
            raise ambiguous(path, [one for one, _ in fitting])
        fit = next(found for one, found in fitting if one is best)
    return adopt_parameters(copy.deepcopy(model).cpu(), as_fp32(fit.state, str(path))).eval()
