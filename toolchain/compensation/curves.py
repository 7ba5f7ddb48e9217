"""Loss curves of a compensated cut: what it costs in nats when units leave and the others are refitted.

Scores take one unit out and leave the rest alone. After a refit (see `refit`) the rest takes over what it can, so a
unit costs only what the others cannot explain. With H = E[h h^T] the second moments of a layer's inputs, W its weights
and G = E[g g^T] the Fisher information of the network's output with respect to the layer's output, the loss when unit j
leaves and the others adapt is (optimal brain surgeon; ZipLM, arXiv 2302.04089)

    1/2 (W_j G W_j^T) / [H^-1]_jj,

and H^-1 and W are updated after every removal, so that losses of the units that follow are joint losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import ImageSet, in_batches
from upvits.calib_data.progress import watched
from upvits.toolchain.compensation.gradients import directions_of, most_at_once, parts_of
from upvits.toolchain.compensation.heads import rotate_heads
from upvits.toolchain.compensation.pvt_stream import cut_stages, measure_stages, stages_can_rotate
from upvits.toolchain.compensation.statistics import add_gram, require_images, split
from upvits.toolchain.compensation.stream import cut_stream, measure_stream, stream_can_rotate
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.depth import name_before
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.planning.curves import Curve, curve_of
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.backward import frozen, gradients_by_segment
from upvits.toolchain.scores.divergence import device_of, divergence, output_scale
from upvits.toolchain.scores.room import with_room
from upvits.toolchain.structure.groups import ChannelGroup

RIDGE = 1e-4
"""Relative to the mean diagonal of H, so that its inverse exists where units are dead or equal."""

BIAS_RIDGE = 1e-5
"""Likewise of the bias, relative to its own diagonal: moments are rounded to fp32."""

EVENNESS = 0.25
"""Added to the importance of every token, relative to the mean one of its image. In a ViT's last block the output
depends on the class token only: as many tokens as images would make most units look redundant."""

SHARE_PER_STEP = 1 / 64
"""Units that leave between two updates of the whole inverse."""


WIDTHS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares of the embedding width at which the KL of the rotated network is measured."""


@dataclass(slots=True)
class LayerStatistics:
    """What is known of a layer that reads prunable units.

    Attributes:
        second: sum over an image's tokens of importance * x x^T, [d + 1, d + 1]; the last input is the bias.
            Importance is the squared gradient at the layer's output, summed over the probes, and evened out a little.
        fisher: sum over an image's tokens and the probes of g g^T, [out, out].
    """

    second: Tensor
    fisher: Tensor


def compensated_curves(
    model: nn.Module, images: ImageSet, *, rotate: bool = True, batch_size: int = 16, seed: int = 0, quiet: bool = True
) -> dict[str, Curve]:
    """Curves for every FFN and attention group, and for the width of every stream that can be rotated.

    FFN units and value dims: as above, from one pass with gradients. q and k dims: Fisher scores of the rotated heads'
    dims, the last first. Widths: KL measured at a few widths of each rotated stream, nothing refitted. Whole heads have
    no curve here, and neither has the width of a stream that cannot be rotated.

    Args:
        model: a timm network of a supported family, in eval mode; it is not changed.
        images: calibration images [N, 3, H, W], normalised; labels are not needed.
        rotate: whether the cut will rotate heads and stream (as `compress` does).
        batch_size: images per pass.
        seed: for the label probes.
        quiet: no progress bar.

    Returns:
        Group name -> curve. Where a basis is rotated, `order` speaks of the rotated dims: planners take sizes only.

    Raises:
        UserError: too few images, or the network gives NaN on them.
    """
    require_images(images)
    model = frozen(model)
    groups = groups_of(model)
    of_kind = {kind: {g.module: g for g in groups if g.kind == kind} for kind in ("ffn", "attention", "qk", "v")}
    turned = model
    if rotate:
        turned = rotate_heads(model, images, list(of_kind["v"]), batch_size=batch_size, quiet=quiet).model.eval()
    readers = {f"{module}.fc2": g for module, g in of_kind["ffn"].items()}
    readers |= {f"{module}.proj": g for module, g in of_kind["v"].items()}
    layers, products = _statistics(turned, list(readers), of_kind["qk"], images, batch_size, seed, quiet)
    orders = {name: _last_dims_first(group) for name, group in readers.items() if rotate and group.kind == "v"}
    curves = _surgeons(turned, readers, layers, orders, quiet)
    for name, group in readers.items():
        if group.kind == "ffn":
            continue
        weight = turned.get_submodule(name).get_parameter("weight")
        scores, qk = products[group.module], of_kind["qk"][group.module]
        order = _last_dims_first(qk) if rotate else curve_of(scores, qk.num_heads).order
        losses = torch.cat([torch.zeros(1, dtype=torch.float64), scores[order].cumsum(0)])
        curves[qk.name] = Curve(order, losses)
        if group.module in of_kind["attention"]:
            values = surgeon(weight, layers[name], group.num_heads, order)
            curves[group.module] = Curve(order, values.loss + losses)
    curves |= _width_curves(model, images, batch_size, seed, quiet) if rotate else {}
    return shared().from_leader(lambda: curves)


def ffn_curves(
    model: nn.Module, images: ImageSet, *, batch_size: int = 16, seed: int = 0, quiet: bool = True
) -> dict[str, Curve]:
    """The curves of the FFN groups alone, without the network being rotated: their orders are the same in every basis
    of heads and stream.

    Args and errors: as for `compensated_curves`.
    """
    require_images(images)
    model = frozen(model)
    readers = {f"{group.module}.fc2": group for group in groups_of(model) if group.kind == "ffn"}
    layers, _ = _statistics(model, list(readers), {}, images, batch_size, seed, quiet)
    return _surgeons(model, readers, layers, {}, quiet)


def _surgeons(
    model: nn.Module,
    readers: Mapping[str, ChannelGroup],
    layers: Mapping[str, LayerStatistics],
    orders: Mapping[str, Tensor],
    quiet: bool,
) -> dict[str, Curve]:
    """The curves of what some layers read; each process computes some of them."""
    found = {}
    for number, name in watched(shared().mine(list(readers)), "Loss curves", quiet=quiet):
        weight = model.get_submodule(name).get_parameter("weight")
        found[number] = surgeon(weight, layers[name], readers[name].num_heads, orders.get(name))
    return {group.name: curve for group, curve in zip(readers.values(), shared().all_of(found), strict=True)}


def _last_dims_first(group: ChannelGroup) -> Tensor:
    """Rotated head dims in the order in which they leave, one of every head in turn."""
    dims = torch.arange(group.size).view(group.num_heads, group.head_dim)
    return dims.flip(1).T.flatten()


def _narrower(
    model: nn.Module, images: ImageSet, batch_size: int, seed: int, quiet: bool
) -> dict[str, tuple[int, Callable[[int], nn.Module]]]:
    """Streams that can be rotated: their widths, and the network with another width of one of them."""
    if stream_can_rotate(model) is None:
        moments = measure_stream(model, images, batch_size=batch_size, seed=seed, quiet=quiet)
        return {"embed": (len(moments.second), lambda width: cut_stream(model, moments, width).model)}
    if stages_can_rotate(model) is not None:
        return {}
    measured = measure_stages(model, images, batch_size=batch_size, seed=seed, quiet=quiet)
    sizes = {group.name: group.size for group in groups_of(model) if group.kind == "embed"}
    return {
        stage: (size, lambda width, stage=stage: cut_stages(model, measured, {stage: range(width)}).model)  # type: ignore[misc]
        for stage, size in sizes.items()
    }


def _width_curves(model: nn.Module, images: ImageSet, batch_size: int, seed: int, quiet: bool) -> dict[str, Curve]:
    fit, held = split(images)  # a rotation looks better on the images that it was made for
    streams = _narrower(model, fit, batch_size, seed, quiet)
    parts, device = shared().mine(in_batches(held, batch_size)), device_of(model)
    scale = output_scale(model, in_batches(held, batch_size))
    curves = {}
    with torch.inference_mode():
        dense = [model(part.to(device)) for _, part in parts]
        for name, (size, narrower) in watched(streams.items(), "Widths of the streams", quiet=quiet):
            points = {0: 0.0}
            for width in sorted({max(2, int(share * size)) for share in WIDTHS}, reverse=True):
                network = narrower(width).eval()
                losses = [
                    divergence(whole, network(part.to(device)), scale)
                    for whole, (_, part) in zip(dense, parts, strict=True)
                ]
                points[size - width] = mean_of(losses, device)
            gone, loss = list(points), torch.tensor(list(points.values()), dtype=torch.float64).cummax(0).values
            # beyond the narrowest width that was measured nobody should go
            table = np.interp(np.arange(size + 1), gone, loss.numpy(), right=float("inf"))
            curves[name] = Curve(torch.arange(size - 1, -1, -1), torch.from_numpy(table))
    return curves


def mean_of(losses: Sequence[Tensor], device: torch.device) -> float:
    """Mean over the images of all processes, from losses [B] of this one's batches."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for part in losses:
        sums += torch.stack([part.sum(), part.new_tensor(float(len(part)))])
    shared().sum(sums)
    return float(sums[0] / sums[1])


def _statistics(
    model: nn.Module,
    names: Sequence[str],
    queries: Mapping[str, ChannelGroup],
    images: ImageSet,
    batch_size: int,
    seed: int,
    quiet: bool,
) -> tuple[dict[str, LayerStatistics], dict[str, Tensor]]:
    """What is known of the layers `names`, and the Fisher scores of q-k dims per attention, per image."""
    network = frozen(model)
    layers, scores = with_room(
        lambda size: _sums(network, names, queries, images, batch_size, size, seed, quiet),
        most_at_once(model, images, batch_size),
    )
    shared().sum(*scores.values())
    for layer in layers.values():
        shared().sum(layer.second, layer.fisher)
        layer.second /= len(images)
        layer.fisher /= len(images)
    return layers, {name: score / len(images) for name, score in scores.items()}


def _sums(
    model: nn.Module,
    names: Sequence[str],
    queries: Mapping[str, ChannelGroup],
    images: ImageSet,
    batch_size: int,
    size: int,
    seed: int,
    quiet: bool,
) -> tuple[dict[str, LayerStatistics], dict[str, Tensor]]:
    """The same as sums over this process's images."""
    device = device_of(model)
    layers, scores = {}, {module: torch.zeros(g.size, dtype=torch.float64) for module, g in queries.items()}
    for name in names:
        out, inputs = model.get_submodule(name).get_parameter("weight").shape
        # products are of fp32, whose rounding is far below RIDGE; their sums are the same in one process and in several
        sizes = (inputs + 1, out)
        layers[name] = LayerStatistics(*(torch.zeros(n, n, dtype=torch.float64, device=device) for n in sizes))
    for part, signs in parts_of(model, images, batch_size, size, "Second moments", seed=seed, quiet=quiet):
        with torch.inference_mode(False):
            leaves = {m: torch.ones(len(part), g.size, device=device, requires_grad=True) for m, g in queries.items()}
        with _taps(model, names, queries, leaves) as seen:
            for found in gradients_by_segment(model, part, partial(directions_of, model, signs=signs), leaves):
                for name, slopes in found.items():
                    if name in scores:
                        scores[name] += slopes.double().square().sum(dim=(0, 1)).cpu() / 2
                    else:
                        _add(layers[name], seen.pop(name), slopes)
                        del leaves[name]
    return layers, scores


def _add(layer: LayerStatistics, inputs: Tensor, slopes: Tensor) -> None:
    """Sum over the tokens of some images: inputs [B, ..., d], gradients [DRAWS, B, ..., out] of what leaves."""
    importance = slopes.square().sum(dim=(0, -1)).flatten(1)
    counted = (importance + EVENNESS * importance.mean(dim=1, keepdim=True)) / (1 + EVENNESS)
    add_gram(layer.fisher, slopes.flatten(0, -2))
    rows = inputs.flatten(0, -2)
    add_gram(
        layer.second, torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) * counted.flatten().sqrt().unsqueeze(1)
    )


@contextmanager
def _taps(
    model: nn.Module, names: Sequence[str], queries: Mapping[str, ChannelGroup], leaves: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """While the model runs: the inputs of layers, and in `leaves` their outputs; masks in `leaves` act on the
    queries."""
    seen: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            seen[name], leaves[name] = args[0].detach(), output

    def mask_queries(group: ChannelGroup, output: Tensor) -> Tensor:
        mask = leaves[group.module].view(len(output), *[1] * (output.ndim - 2), group.size)
        return torch.cat([output[..., : group.size] * mask, output[..., group.size :]], dim=-1)

    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(
                lambda _, args, output, name=name: note(name, args, output)
            )
            hooks.enter_context(hook)
        for group in queries.values():
            module = model.get_submodule(group.queries[0].rpartition(".")[0])
            hook = module.register_forward_hook(lambda _, __, output, group=group: mask_queries(group, output))
            hooks.enter_context(hook)
        yield seen


def surgeon(weight: Tensor, layer: LayerStatistics, num_heads: int = 1, order: Tensor | None = None) -> Curve:
    """Greedy removal of a layer's inputs, all others refitted, by joint quadratic loss.

    Args:
        weight: of the reading layer, [out, d].
        layer: second moments of its inputs [d + 1, d + 1] and Fisher of its output [out, out]; only the shape of the
            latter matters, its size is in the former.
        num_heads: inputs leave in turns, one of every head.
        order: a given order of removal [d] instead of the greedy one; only the loss is computed.
    """
    second, fisher = layer.second.double(), layer.fisher.double()
    size = weight.shape[1]
    ridge = RIDGE * second.diagonal()[:-1].mean().clamp_min(1e-300)
    shifts = torch.full((size + 1,), float(ridge), dtype=torch.float64, device=second.device)
    shifts[-1] = BIAS_RIDGE * float(second[-1, -1].clamp_min(1e-300))
    inverse = _inverse(second, shifts)
    values, vectors = torch.linalg.eigh(fisher / fisher.trace().clamp_min(1e-300))
    # W G W^T = |W G^(1/2)|^2: in this basis the loss is a plain squared length
    rows = weight.detach().double().T @ (vectors * values.clamp_min(0).sqrt())
    rows = torch.cat([rows, rows.new_zeros(1, len(weight))])
    left = torch.arange(size + 1, device=second.device)  # inputs that are still there; the last one is the bias
    removed: list[int] = []
    losses: list[float] = [0.0]
    per_step = num_heads * max(1, int(size * SHARE_PER_STEP / num_heads))
    while len(removed) < size:
        count = min(per_step, size - len(removed))
        given = None if order is None else order[len(removed) : len(removed) + count].to(left.device)
        places = None if given is None else torch.searchsorted(left, given)
        batch, costs = _next(inverse, rows, count, num_heads, places)
        removed += left[batch].tolist()
        losses += costs
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[batch] = False
        columns = inverse[:, batch]
        gain = torch.linalg.solve(columns[batch], columns[stays].T).T
        rows = torch.addmm(rows[stays], gain, rows[batch], alpha=-1)
        inverse = torch.addmm(inverse[stays][:, stays], gain, columns[stays].T, alpha=-1)
        left = left[stays]
    loss = torch.tensor(losses, dtype=torch.float64).clamp_min(0).cumsum(0)
    return Curve(torch.tensor(removed), loss)


def _inverse(second: Tensor, shifts: Tensor) -> Tensor:
    """Inverse of moments [n, n] with a ridge [n], which grows where rounding of the moments asks for more.

    Raises:
        UserError: the moments are not finite.
    """
    if not second.isfinite().all():
        raise UserError(
            "What the layers of the dense network read is not finite.",
            why="Activations or gradients overflow on some images.",
            fix="Check the weights and the normalisation of the images.",
        )
    while True:
        factor, failed = torch.linalg.cholesky_ex(second + shifts.diag())
        if not failed:
            return torch.cholesky_inverse(factor)
        shifts = 10 * shifts


def with_joint_units(plan: PruningPlan, curves: Mapping[str, Curve]) -> PruningPlan:
    """The plan with the FFN units that the others can least stand in for, instead of those with the highest scores.

    Args:
        plan: made for the network of the curves.
        curves: of `compensated_curves`.
    """
    kept = {}
    for name, units in plan.keep.items():
        if name.endswith(".mlp"):
            order = curves[name_before(name, plan.blocks)].order
            kept[name] = tuple(sorted(order[len(order) - len(units) :].tolist()))
    return replace(plan, keep={**plan.keep, **kept}, asked={**plan.asked, "ffn_units": "joint loss"})


def _next(
    inverse: Tensor, rows: Tensor, count: int, num_heads: int, fixed: Tensor | None
) -> tuple[Tensor, list[float]]:
    """The next inputs to leave and what each adds, exact among a few candidates of every head."""
    device = inverse.device
    if fixed is None:
        costs = rows.square().sum(dim=1) / inverse.diagonal().clamp_min(1e-300)
        pools = costs[:-1].view(num_heads, -1)
        few = min(4 * count // num_heads, pools.shape[1])
        candidates = pools.topk(few, dim=1, largest=False).indices
        candidates = (candidates + torch.arange(num_heads, device=device).view(-1, 1) * pools.shape[1]).flatten()
        head = torch.arange(num_heads, device=device).repeat_interleave(few)
    else:
        candidates, head = fixed, torch.arange(len(fixed), device=device)
    small, part = inverse[candidates][:, candidates], rows[candidates]
    products = part @ part.T
    free = torch.ones(len(candidates), dtype=torch.bool, device=device)
    chosen, added = [], []
    for turn in range(count):
        cost = products.diagonal().clamp_min(0) / small.diagonal().clamp_min(1e-300)
        now = head == (turn % num_heads if fixed is None else turn)
        index = int(torch.where(free & now, cost, torch.inf).argmin())
        chosen.append(index)
        added.append(float(cost[index]) / 2)
        column = small[:, index] / small[index, index]
        # the others take over what they can: rows become rows - column rows[index]
        across = torch.outer(column, products[index])
        products = products - across - across.T + torch.outer(column, column) * products[index, index]
        small = small - torch.outer(column, small[index])
        free[index] = False
    return candidates[chosen], added
