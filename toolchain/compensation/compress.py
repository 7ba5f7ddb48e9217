"""What `prune` does, with as little loss as closed forms allow: shorten, rotate, cut, refit."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from upvits.calib_data.prepared import ImageSet, in_batches
from upvits.toolchain.compensation.heads import rotate_heads
from upvits.toolchain.compensation.pvt_stream import rotate_stages, stages_can_rotate
from upvits.toolchain.compensation.refit import LayerReport, Targets, refit
from upvits.toolchain.compensation.statistics import TooFewImagesError, require_images, split
from upvits.toolchain.compensation.stream import rotate_stream, stream_can_rotate
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.depth import name_before, shorten
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores import divergence
from upvits.toolchain.scores.divergence import device_of, outputs_on, scale_of
from upvits.toolchain.structure.groups import ChannelGroup
from upvits.toolchain.surgery.deletion import cut_out, delete_units


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What compensation did and what it is worth.

    Attributes:
        images, held_out: calibration images in all, and those of them that only checked.
        rotated: groups whose basis was rotated before the cut.
        layers: what the refit did, in order.
        kl_deleted: KL to the dense network in nats on held-out images after plain `prune` of the same plan.
        kl_cut: after shortening, rotating and cutting.
        kl: of the network that is returned; chosen on these images, so a little too low.
        accepted: False when plain `prune` was better and is returned.
        warnings: what did not go as it should.
        seconds: of all this.
    """

    images: int
    held_out: int
    rotated: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    kl_deleted: float
    kl_cut: float
    kl: float
    accepted: bool
    warnings: tuple[str, ...] = field(default=())
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Compressed:
    """A pruned network and how it came about."""

    model: nn.Module
    report: CompressionReport


def compress(
    model: nn.Module,
    plan: PruningPlan,
    images: ImageSet,
    *,
    rotate: bool = True,
    batch_size: int = 32,
    quiet: bool = True,
) -> Compressed:
    """The network that `plan` describes, rotated before the cut and refitted after it. Labels are not needed.

    The result has exactly the plan's widths and is a stock timm network wherever `prune` gives one. It is never worse
    on held-out calibration images than `prune` of the same plan, nor than the cut before the refit: otherwise that is
    returned, with a warning. The same images give the same network. Where a basis is rotated (streams, dims of heads),
    the plan's choice of units is not used, only their number.

    Args:
        model: the dense network; it is not changed.
        plan: made for this network. Where a basis is rotated, only the number of its kept dims matters.
        images: calibration images [N, 3, H, W], normalised; 500 or more. Every fifth is held out for checks.
        rotate: turn the bases of heads and of the residual stream before they are cut (where that is possible).
        batch_size: images per pass.
        quiet: no progress bar.

    Raises:
        UserError: too few images for the regressions, or the dense network gives NaN on them.
    """
    started = time.perf_counter()
    require_images(images)
    model = copy.deepcopy(model).eval()
    fit, held = split(images)
    dense_outputs = outputs_on(model, in_batches(images, batch_size))
    scale, expected = scale_of(model, dense_outputs), in_batches(split(dense_outputs)[1], batch_size)
    deleted = delete_units(model, plan).eval()  # refuses the plan of another network
    student, dense, targets, rotated = _cut(model, plan, fit, rotate, batch_size, quiet)
    shared().agree_on(student)
    shared().agree_on(dense)
    targets = replace(targets, streams=_agreed(targets.streams), maps=_agreed(targets.maps))

    outputs = _kept_features(model, plan)

    def kl(network: nn.Module) -> float:
        total = torch.zeros((), dtype=torch.float64, device=device_of(model))
        with torch.inference_mode():
            for number, chunk in shared().mine(in_batches(held, batch_size)):
                found = network(chunk.to(device_of(model)))
                total += divergence(expected[number][:, outputs].to(found), found, scale).sum()
        shared().sum(total)
        return float(total) / len(held)

    cut = copy.deepcopy(student)
    layers = refit(student, dense, images, targets, batch_size=batch_size, quiet=quiet)
    _require_enough(layers, len(images))
    kl_deleted, kl_cut, kl_student = kl(deleted), kl(cut), kl(student)
    warnings = [f"{layer.layer}: {layer.warning}" for layer in layers if layer.warning]
    accepted = min(kl_student, kl_cut) <= kl_deleted
    if not accepted:
        warnings.append(f"plain pruning was better on held-out images (KL {kl_deleted:.4g} against {kl_student:.4g})")
    elif kl_cut < kl_student:
        warnings.append(f"the refit was left out: held-out KL {kl_cut:.4g} without it, {kl_student:.4g} with it")
        student, kl_student = cut, kl_cut
    report = CompressionReport(
        images=len(images),
        held_out=len(held),
        rotated=rotated,
        layers=tuple(layers),
        kl_deleted=kl_deleted,
        kl_cut=kl_cut,
        kl=kl_student if accepted else kl_deleted,
        accepted=accepted,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
    )
    return Compressed(student if accepted else deleted, report)


def _agreed(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps of streams as they are in the first of several processes."""
    return shared().from_leader(lambda: {name: value.cpu() for name, value in maps.items()})


def _kept_features(model: nn.Module, plan: PruningPlan) -> list[int] | slice:
    """Of the dense network's outputs, those that the pruned one has: features lose the channels of the last stream."""
    if getattr(model, "num_classes", 0) > 0:
        return slice(None)
    last = [group.name for group in groups_of(model) if group.kind == "embed"][-1]
    return list(plan.keep[last]) if last in plan.keep else slice(None)


def _require_enough(layers: list[LayerReport], images: int) -> None:
    """Refuses a calibration set with which most layers could not be fitted; single ones are skipped with a warning."""
    needed = [layer for layer in layers if layer.action != "exact"]
    short = [layer for layer in needed if 0 < layer.rows <= layer.inputs]
    if 2 * len(short) > len(needed):
        enough = max(-(-images * (layer.inputs + 1) // layer.rows) for layer in short)
        raise TooFewImagesError(
            f"{images} calibration images are too few for {len(short)} of {len(needed)} layers.",
            why="A regression needs more observations than unknowns.",
            fix=f"Give {enough} images or more.",
        )


def _cut(
    model: nn.Module, plan: PruningPlan, images: ImageSet, rotate: bool, batch_size: int, quiet: bool
) -> tuple[nn.Module, nn.Module, Targets, tuple[str, ...]]:
    """The pruned network before its refit, the (rotated) dense network, how they correspond, and what was rotated."""
    dense = model
    base = shorten(dense, plan.blocks) if plan.blocks else dense
    keep, groups = dict(plan.keep), {group.name: group for group in groups_of(base)}
    narrower = [name for name in keep if rotate and _heads_get_narrower(groups[name], plan)]
    rotated = sorted({groups[name].module for name in narrower})
    if rotated:
        sources = [name_before(name, plan.blocks) for name in rotated]
        dense = rotate_heads(model, images, sources, batch_size=batch_size, quiet=quiet).model.eval()
        base = shorten(dense, plan.blocks) if plan.blocks else dense
        keep |= {name: _first_dims(groups[name], len(keep[name])) for name in narrower}
    streams = {group.name: _selection(group, keep) for group in groups.values() if group.kind == "embed"}
    # a single channel has nothing left after its norm, and no basis to turn
    narrower_streams = {name: keep[name] for name, whole in streams.items() if 1 < len(whole) < whole.shape[1]}
    maps: dict[str, Tensor] = {}
    if rotate and narrower_streams:
        base, turned, maps = _turn_streams(base, narrower_streams, images, batch_size, quiet)
        streams |= turned
        rotated += list(turned)
        keep = {name: units for name, units in keep.items() if name not in turned}
    cut_plan = replace(plan, keep=keep, blocks={})
    student = cut_out(base, cut_plan).eval()
    writers = {
        piece.parameter.removesuffix(".weight"): streams[group.name]
        for group in groups.values()
        if group.kind == "embed"
        for piece in group.slices
        if piece.axis == 0 and piece.parameter.endswith(("attn.proj.weight", "mlp.fc2.weight"))
    }
    # The embedding layer of a rotated or selected stream is exact as it is: it reads the images themselves.
    maps.pop("patch_embed.proj", None)
    aimed_elsewhere = {"patch_embed.proj", *writers, *maps}
    rows = {name: pair for name, pair in _row_map(base, cut_plan).items() if name not in aimed_elsewhere}
    return student, dense, Targets(rows, writers, plan.blocks, maps), tuple(rotated)


def _turn_streams(
    base: nn.Module, narrower: Mapping[str, tuple[int, ...]], images: ImageSet, batch_size: int, quiet: bool
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Rotate and cut streams where the network allows it: the network, and maps of its streams and of other layers."""
    if "embed" in narrower and stream_can_rotate(base) is None:
        turned = rotate_stream(base, images, len(narrower["embed"]), batch_size=batch_size, quiet=quiet)
        return turned.model.eval(), {"embed": turned.stream_map}, {}
    if stages_can_rotate(base) is None:
        staged = rotate_stages(base, images, narrower, batch_size=batch_size, quiet=quiet)
        return staged.model.eval(), staged.stream_maps, staged.layer_maps
    return base, {}, {}


def _heads_get_narrower(group: ChannelGroup, plan: PruningPlan) -> bool:
    """Whether every head stays and loses dims: whole heads and merged ones keep the plan's choice."""
    heads = plan.num_heads.get(group.module, group.num_heads)
    of_heads = group.kind in ("attention", "qk", "v")
    return of_heads and heads == group.num_heads and len(plan.keep[group.name]) < group.size


def _first_dims(group: ChannelGroup, count: int) -> tuple[int, ...]:
    per_head = count // group.num_heads
    return tuple(head * group.head_dim + dim for head in range(group.num_heads) for dim in range(per_head))


def _selection(group: ChannelGroup, keep: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Kept channels of a stream as a matrix [k, d]."""
    whole = torch.eye(group.size, dtype=torch.float64)
    return whole[list(keep[group.name])] if group.name in keep else whole


def _row_map(base: nn.Module, plan: PruningPlan) -> dict[str, tuple[Tensor, Tensor]]:
    """For every linear layer, which outputs of `base` it keeps and how they are scaled.

    The surgery itself is asked: it is run on weights that are row numbers, and on ones.
    """
    probes = []
    for fill in (torch.ones_like, lambda w: torch.arange(len(w)).view(-1, *[1] * (w.ndim - 1)).expand_as(w)):
        probe = copy.deepcopy(base).cpu()
        for parameter in probe.parameters():
            parameter.data = fill(parameter.data).double()
        probes.append(cut_out(probe, plan))
    ones, numbers = (dict(probe.named_modules()) for probe in probes)
    result = {}
    for name, module in ones.items():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            factors = module.weight.detach().flatten(1)[:, 0]
            other: Any = numbers[name]
            result[name] = ((other.weight.detach().flatten(1)[:, 0] / factors).round().long(), factors)
    return result
