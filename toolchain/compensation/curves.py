"""Loss curves of a compensated cut: what it costs in nats when units leave and the others are refitted.

Scores take one unit out and leave the rest alone. After a refit (see `refit`) the rest takes over what it can, so a
unit costs only what the others cannot explain. With H = E[h h^T] the second moments of a layer's inputs, W its weights
and G = E[g g^T] the Fisher information of the network's output with respect to the layer's output, the loss when unit j
leaves and the others adapt is (optimal brain surgeon; ZipLM, arXiv 2302.04089)

    1/2 (W_j G W_j^T) / [H^-1]_jj,

and H^-1 and W are updated after every removal, so that losses of the units that follow are joint losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calib_data.progress import watched
from toolchain.compensation.heads import rotate_heads
from toolchain.compensation.statistics import require_images
from toolchain.compensation.stream import rotate_stream, stream_can_rotate
from toolchain.families import groups_of
from toolchain.groups import ChannelGroup
from toolchain.planning.curves import Curve
from toolchain.scores.divergence import device_of, divergence, output_scale
from toolchain.scores.fisher import fisher, probes_of

RIDGE = 1e-4
"""Relative to the mean diagonal of H, so that its inverse exists where units are dead or equal."""

SHARE_PER_STEP = 1 / 64
"""Units that leave between two updates of the whole inverse."""


@dataclass(slots=True)
class _Reader:
    """What is known of a layer that reads prunable units.

    Attributes:
        second: sum over tokens of importance * x x^T, [d + 1, d + 1] float64; the last input is the bias.
        fisher: sum over tokens of g g^T, [out, out] float64.
    """

    second: Tensor
    fisher: Tensor


def compensated_curves(
    model: nn.Module,
    images: Tensor,
    *,
    rotate: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = True,
) -> dict[str, Curve]:
    """Curves for every FFN and attention group, and for the embedding width where the stream can be rotated.

    FFN units and value dims: as above, from one pass with gradients. q and k dims: the Fisher scores of the rotated
    heads' dims, the last first. Embedding width: KL measured at a few widths of the rotated stream. Whole heads have no
    curve here.

    Args:
        model: a timm network of a supported family; it is not changed.
        images: calibration images [N, 3, H, W], normalised; labels are not needed.
        rotate: whether the cut will rotate heads and stream (as `compress` does).
        batch_size: images per pass.
        seed: for the label probes (more than 16 classes).
        quiet: no progress bar.

    Returns:
        Group name -> curve. Where heads are rotated, `order` speaks of the rotated dims: only the lengths matter.
    """
    require_images(images)
    groups = groups_of(model)
    scale = output_scale(model, images.split(batch_size))
    attention = [group for group in groups if group.kind == "attention"]
    if rotate:
        names = [group.name for group in attention]
        turned = rotate_heads(model, images, names, batch_size=batch_size, quiet=quiet).model.eval()
    else:
        turned = model
    readers = {f"{g.name}.fc2": g for g in groups if g.kind == "ffn"} | {f"{g.name}.proj": g for g in attention}
    known = _statistics(turned, list(readers), images.split(batch_size), scale, seed, quiet)
    curves = {}
    for name, group in watched(readers.items(), "Loss curves", quiet=quiet, total=len(readers)):
        weight = turned.get_submodule(name).get_parameter("weight")
        fixed = _last_dims_first(group) if rotate and group.kind == "attention" else None
        curves[group.name] = surgeon(weight, known[name].second, known[name].fisher, group.num_heads, fixed)
    return curves


def _last_dims_first(group: ChannelGroup) -> Tensor:
    dims = torch.arange(group.size).view(group.num_heads, group.head_dim)
    return dims.flip(1).T.flatten()


def _statistics(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], scale: float | None, seed: int, quiet: bool
) -> dict[str, _Reader]:
    """Second moments of the inputs and Fisher of the outputs of some Linear layers, per image."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    known: dict[str, _Reader] = {}

    def note(name: str, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs[name] = args[0].detach()
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        outputs[name] = output
        return output

    hooks = []
    for name in names:
        layer = model.get_submodule(name)
        out, size = layer.get_parameter("weight").shape
        zeros = (torch.zeros(n, n, dtype=torch.float64, device=device_of(model)) for n in (size + 1, out))
        known[name] = _Reader(*zeros)
        hooks.append(layer.register_forward_hook(lambda _, args, output, name=name: note(name, args, output)))
    try:
        for batch in watched(batches, "Second moments", quiet=quiet):
            with torch.enable_grad():
                logits = functional_call(model, weights, batch.to(device_of(model))).float()
            probes = probes_of(logits.detach().cpu(), scale, generator).to(logits.device)
            importance = {name: inputs[name].new_zeros(inputs[name].shape[:-1]) for name in names}
            for index, probe in enumerate(probes):
                gradients = torch.autograd.grad(
                    (probe * logits).sum(), [outputs[name] for name in names], retain_graph=index + 1 < len(probes)
                )
                for name, gradient in zip(names, gradients, strict=True):
                    importance[name] += gradient.square().sum(dim=-1)
                    rows = gradient.flatten(0, -2)
                    known[name].fisher += (rows.T @ rows).double()
            for name in names:
                x = inputs[name].flatten(0, -2).double()
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
                known[name].second += (x * importance[name].flatten().double().unsqueeze(1)).T @ x
    finally:
        for hook in hooks:
            hook.remove()
    count = sum(len(batch) for batch in batches)
    return {name: _Reader(reader.second / count, reader.fisher / count) for name, reader in known.items()}


def surgeon(weight: Tensor, second: Tensor, fisher: Tensor, num_heads: int = 1, order: Tensor | None = None) -> Curve:
    """Greedy removal of a layer's inputs, all others refitted, by joint quadratic loss.

    Args:
        weight: of the reading layer, [out, d].
        second: importance-weighted second moments of its inputs and the bias [d + 1, d + 1], float64: summed over the
            tokens of an image, each counted as often as the squared gradient at its output says.
        fisher: of its output [out, out], float64; only its shape matters, its size is in `second`.
        num_heads: inputs leave in turns, one of every head.
        order: a given order of removal [d] instead of the greedy one; only the loss is computed.
    """
    size = weight.shape[1]
    ridge = RIDGE * second.diagonal()[:-1].mean().clamp_min(1e-300)
    shifts = torch.full((size + 1,), float(ridge), dtype=torch.float64, device=second.device)
    shifts[-1] = 1e-9 * float(second[-1, -1].clamp_min(1e-300))
    inverse = torch.linalg.inv(second + shifts.diag())
    values, vectors = torch.linalg.eigh(fisher / fisher.trace().clamp_min(1e-300))
    # W G W^T = |W G^(1/2)|^2: in this basis the loss is a plain squared length
    rows = torch.cat([weight.detach().double().T @ (vectors * values.clamp_min(0).sqrt()), torch.zeros(1, len(weight))])
    alive = torch.ones(size + 1, dtype=torch.bool, device=second.device)
    alive[-1] = False  # the bias stays
    removed: list[int] = []
    losses: list[float] = [0.0]
    per_step = num_heads * max(1, int(size * SHARE_PER_STEP / num_heads))
    while len(removed) < size:
        count = min(per_step, size - len(removed))
        wanted = None if order is None else order[len(removed) : len(removed) + count]
        batch, costs = _next(inverse, rows, alive, count, num_heads, wanted)
        block = torch.linalg.inv(inverse[batch][:, batch])
        gain = inverse[:, batch] @ block
        rows = rows - gain @ rows[batch]
        inverse = inverse - gain @ inverse[batch]
        alive[batch] = False
        removed += batch.tolist()
        losses += costs
        # what is gone must not come back through rounding
        rows[batch], inverse[batch], inverse[:, batch] = 0, 0, 0
    loss = torch.tensor(losses, dtype=torch.float64).clamp_min(0).cumsum(0)
    return Curve(torch.tensor(removed), loss)


def _next(
    inverse: Tensor, rows: Tensor, alive: Tensor, count: int, num_heads: int, wanted: Tensor | None
) -> tuple[Tensor, list[float]]:
    """The next units to leave and what each adds, exact among a few candidates of every head."""
    costs = torch.where(alive, rows.square().sum(dim=1) / inverse.diagonal().clamp_min(1e-300), torch.inf)[:-1]
    if wanted is None:
        pools = costs.view(num_heads, -1)
        few = min(4 * count // num_heads, int(alive.sum()) // num_heads)
        candidates = pools.topk(few, dim=1, largest=False).indices
        candidates = (candidates + torch.arange(num_heads, device=costs.device).view(-1, 1) * pools.shape[1]).flatten()
        head = torch.arange(num_heads, device=costs.device).repeat_interleave(few)
    else:
        candidates, head = wanted.to(costs.device), torch.arange(len(wanted), device=costs.device)
    small, part = inverse[candidates][:, candidates], rows[candidates]
    free = torch.ones(len(candidates), dtype=torch.bool, device=costs.device)
    chosen, added = [], []
    for turn in range(count):
        cost = part.square().sum(dim=1) / small.diagonal().clamp_min(1e-300)
        now = head == (turn % num_heads if wanted is None else turn)
        index = int(torch.where(free & now, cost, torch.inf).argmin())
        chosen.append(index)
        added.append(float(cost[index]) / 2)
        column = small[:, index] / small[index, index]
        part = part - column.unsqueeze(1) * part[index]
        small = small - torch.outer(column, small[index])
        free[index] = False
    return candidates[chosen], added
