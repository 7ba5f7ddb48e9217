"""Cutting the planned units out of a network."""

from __future__ import annotations

import math

import torch
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of, narrow
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.depth import shorten
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.planning.document import widths_kept
from upvits.toolchain.structure.groups import cut
from upvits.toolchain.structure.layers import adopt_parameters
from upvits.toolchain.structure.timm_config import update_config


def delete_units(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The network that `plan` describes, with the weights of the kept units: first fewer blocks, then narrower ones.

    Plain deletion, as in the paper; `toolchain.prune` also compensates for what was cut.

    Softmax logits keep their scale: a narrower head divides by the root of its own head_dim, so sqrt(new / old) is
    folded into the query weights. Without that, attention gets sharper with every cut.

    Args:
        model: the dense network; it is not changed.
        plan: made for this network.

    Returns:
        A network of the same timm class with its own weights.

    Raises:
        UserError: the plan was made for another network.

    Example:
        >>> import timm
        >>> from upvits import toolchain
        >>> dense = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        >>> scores = toolchain.score(dense, method="magnitude")
        >>> small = toolchain.delete_units(dense, toolchain.plan(dense, scores, ratio=0.5))
        >>> small.embed_dim, small.blocks[0].attn.head_dim, small.blocks[0].mlp.fc1.out_features
        (96, 32, 384)
    """
    require_same_network(model, plan)
    return cut_out(model, plan)


def require_same_network(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a plan that was made for other weights.

    Raises:
        UserError: it was.
    """
    if plan.model_digest != weights_digest(model):
        raise UserError(
            "This plan was made for another network.",
            why="Which units matter belongs to exactly the weights that they were scored on.",
            fix="Score and plan this network.",
        )


def cut_out(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """As `delete_units`, from any network of the plan's shape: one in another basis, for example."""
    model = shorten(model, plan.blocks) if plan.blocks else model
    groups = groups_of(model)
    keep = {name: torch.tensor(units) for name, units in plan.keep.items()}
    state = cut(model.state_dict(), groups, keep)
    for group in groups:
        if group.queries and group.name in keep:
            head_dim = len(plan.keep[group.name]) // plan.num_heads[group.module]
            if head_dim != group.head_dim:
                rows = slice(0, len(plan.keep[group.name]))
                for name in group.queries:
                    state[name] = state[name].clone()
                    state[name][rows] *= math.sqrt(head_dim / group.head_dim)
    pruned = narrow(model, widths_kept(plan.keep, plan.num_heads))
    if plan.architecture is not None:
        update_config(pruned, architecture=plan.architecture)
    return adopt_parameters(pruned, state)
