"""Scores by the definition: take every unit out and look at the output.

What the definition repeats for every unit and what nobody needs is not computed: dense outputs and the streams in front
of each block are computed once; a unit re-runs the network from its own block on; an FFN unit, whose removal takes
h_u w_u from the stream, from the next block on; the last block of a ViT only for the tokens that the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from upvits.calib_data.prepared import ImageSet, in_batches
from upvits.calib_data.progress import watched
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.divergence import device_of, divergence, half_sums
from upvits.toolchain.scores.masks import masked
from upvits.toolchain.scores.suffix import Chain, chain_of
from upvits.toolchain.structure.groups import ChannelGroup

Units = Mapping[str, Sequence[int]]


def exact_kl(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    scale: float | None,
    units: Units,
    rows: int,
    quiet: bool,
) -> dict[str, Tensor]:
    """Sums over images of KL(dense || without the unit), on two halves of the images.

    Args:
        model: the dense network in eval mode.
        groups: its groups.
        batches: the proxy set; one batch is worked on at a time, so memory does not grow with the set.
        scale: see `divergence`.
        units: group name -> units to measure.
        rows: a pass holds about as many images times units.
        quiet: no progress bar.

    Returns:
        Group name -> float64 [2, size]; NaN where a unit was not asked for.
    """
    totals = {group.name: torch.full((2, group.size), torch.nan, dtype=torch.float64) for group in groups}
    for name, chosen in units.items():
        totals[name][:, list(chosen)] = 0.0
    mine = shared().mine(batches)
    count = sum(len(chosen) for chosen in units.values()) * len(mine)
    with torch.inference_mode():
        chain = chain_of(model, groups, batches[0][:2].to(device_of(model)))
        work = (
            (number, name, unit, per_image)
            for number, batch in mine
            for name, part, kl in _without_units(model, groups, chain, batch, scale, units, rows)
            for unit, per_image in zip(part, kl, strict=True)
        )
        for number, name, unit, per_image in watched(work, "Scoring units (kl)", quiet=quiet, total=count):
            totals[name][:, unit] += half_sums(per_image, number)
    shared().sum(*totals.values())
    return totals


def kl_per_image(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    chain: Chain,
    images: ImageSet,
    scale: float | None,
    units: Units,
    rows: int,
) -> dict[str, Tensor]:
    """KL of chosen units image by image: group name -> float64 [units, B]; arguments as for `exact_kl`.

    Processes that share it take every so-many-th unit.
    """
    process = shared()
    own = {name: [unit for _, unit in process.mine(chosen)] for name, chosen in units.items()}
    found = _kl_of(model, groups, chain, images, scale, own, rows)
    if process.world_size == 1:
        return found
    result = {name: torch.zeros(len(chosen), len(images), dtype=torch.float64) for name, chosen in units.items()}
    for name, values in found.items():
        result[name][process.rank :: process.world_size] = values
    process.sum(*result.values())
    return result


def _kl_of(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    chain: Chain,
    images: ImageSet,
    scale: float | None,
    units: Units,
    rows: int,
) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {name: [] for name, chosen in units.items() if chosen}
    with torch.inference_mode():
        for batch in in_batches(images, rows):
            parts: dict[str, list[Tensor]] = {name: [] for name in columns}
            for name, _, kl in _without_units(model, groups, chain, batch, scale, units, rows):
                parts[name].append(kl)
            for name, values in parts.items():
                columns[name].append(torch.cat(values))
    return {name: torch.cat(values, dim=1) for name, values in columns.items()}


def _without_units(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    chain: Chain,
    batch: Tensor,
    scale: float | None,
    units: Units,
    rows: int,
) -> Iterator[tuple[str, Sequence[int], Tensor]]:
    """For one batch: (group, units, their KL [units, B]), group by group as the network runs."""
    stream = batch.to(device_of(model))
    dense = model(stream)
    for index, segment in enumerate(chain.segments):
        here = [group for group in groups if chain.starts[group.name] == index and units.get(group.name)]
        with _kept_inputs(model, [group for group in here if group.kind == "ffn"]) as hidden:
            after = segment.run(stream)
        for group in here:
            chosen, step = units[group.name], max(1, rows // len(batch))
            for part in (chosen[i : i + step] for i in range(0, len(chosen), step)):
                if group.name in hidden:
                    outputs = _without_ffn_units(model, chain, index, group, after, hidden[group.name], part)
                else:
                    outputs = _without_masked_units(model, chain, index, groups, group, stream, part)
                kl = divergence(dense.repeat(len(part), 1), outputs, scale)
                yield group.name, part, kl.view(len(part), -1).cpu()
        stream = after


@contextmanager
def _kept_inputs(model: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[dict[str, Tensor]]:
    """Group name -> what enters the second layer of that FFN in a forward pass inside this context."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: kept.__setitem__(name, args[0])

    with ExitStack() as hooks:
        for group in groups:
            second = model.get_submodule(group.masks[0].module)
            hooks.enter_context(second.register_forward_pre_hook(keep(group.name)))
        yield kept


def _without_ffn_units(
    model: nn.Module,
    chain: Chain,
    index: int,
    group: ChannelGroup,
    after: Tensor,
    hidden: Tensor,
    part: Sequence[int],
) -> Tensor:
    """Outputs [units * B, C] when the block's result loses h_u w_u."""
    second = model.get_submodule(group.masks[0].module)
    columns = second.get_parameter("weight")[:, list(part)].T
    layer_scale = getattr(model.get_submodule(chain.segments[index].name), "ls2", None)
    if isinstance(layer_scale, nn.Module) and hasattr(layer_scale, "gamma"):
        columns = columns * layer_scale.get_parameter("gamma")
    values = hidden[..., list(part)]
    if chain.read is not None and index + 2 == len(chain.segments):
        after, values = after[:, : chain.read], values[:, : chain.read]
    values = values.movedim(-1, 0).reshape(len(part), len(after), *after.shape[1:-1], 1)
    lost = values * columns.view(len(part), *[1] * (after.ndim - 1), -1)
    return chain.run((after - lost).flatten(0, 1), index + 1)


def _without_masked_units(
    model: nn.Module,
    chain: Chain,
    index: int,
    groups: Sequence[ChannelGroup],
    group: ChannelGroup,
    stream: Tensor,
    part: Sequence[int],
) -> Tensor:
    """Outputs [units * B, C] from the group's first segment on, with one unit masked in each copy of the batch."""
    mask = torch.ones(len(part), group.size, device=stream.device, dtype=stream.dtype)
    mask[range(len(part)), list(part)] = 0
    repeated = stream.repeat(len(part), *[1] * (stream.ndim - 1))
    # the short way through the last block does not call qkv, where attention is masked
    short = index + 2 < len(chain.segments) or group.kind == "embed"
    with masked(model, groups, {group.name: mask.repeat_interleave(len(stream), dim=0)}):
        return chain.run(repeated, index) if short else chain.run_all(repeated, index)
