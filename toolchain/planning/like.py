"""The depth and the widths of a smaller published model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import family_of, narrow
from upvits.toolchain.planning.depth_cut import blocks_left
from upvits.toolchain.scores import Scores
from upvits.toolchain.structure.groups import ChannelGroup, Widths, widths_of
from upvits.toolchain.structure.timm_config import architecture_of


def blocks_like(model: nn.Module, scores: Scores, like: nn.Module) -> dict[str, tuple[tuple[int, int], ...]]:
    """The blocks to keep so that this network gets as deep as a smaller published one.

    Raises:
        UserError: it is of another family or deeper, or the scores say nothing on depth.
    """
    name = architecture_of(like)
    if family_of(like) is not family_of(model):
        raise UserError(f"{name} is of another family.", fix="Name a smaller model of the same family.")
    counts, counts_like = family_of(model).block_lists(model), family_of(like).block_lists(like)
    if set(counts) != set(counts_like) or any(counts_like[listed] > count for listed, count in counts.items()):
        raise UserError(
            f"{name} has more blocks than this network ({_depths(counts_like)}, here {_depths(counts)}).",
            fix="Name a model that is nowhere deeper.",
        )
    removed = {listed: count - counts_like[listed] for listed, count in counts.items()}
    return blocks_left(scores, removed, f"{name} has another depth ({_depths(counts_like)}, here {_depths(counts)})")


def _depths(lists: Mapping[str, int]) -> str:
    return " + ".join(str(count) for count in lists.values()) + " blocks"


def widths_like(model: nn.Module, groups: Sequence[ChannelGroup], like: nn.Module, components: Sequence[str]) -> Widths:
    """The widths of a smaller published model of this depth, checked to be reachable by removing and merging.

    Args:
        model: the network, as deep as `like`.
        groups: its groups.
        like: the smaller model.
        components: with `qk_v`, q·k and v dims get equal numbers, but are chosen on their own.
    """
    name = architecture_of(like)
    target = {group.name: group for group in family_of(like).groups(like)}
    if set(target) != {group.name for group in groups}:
        raise UserError(f"{name} has other parts than this network.", fix="Name a smaller model of the same kind.")
    for group in groups:
        other = target[group.name]
        if other.size > group.size or group.num_heads % other.num_heads:
            raise UserError(
                f"{name} does not fit into this network: {group.name} has {other.size} units there ({other.num_heads} "
                f"heads) and {group.size} here ({group.num_heads} heads).",
                fix="Name a model that is smaller everywhere and whose number of heads divides this one's.",
            )
    widths = widths_of(tuple(target.values()))
    structure, structure_like = (
        {name: tensor.shape for name, tensor in m.state_dict().items()} for m in (narrow(model, widths), like)
    )
    if structure != structure_like:
        differing = sorted(
            name for name in {*structure, *structure_like} if structure.get(name) != structure_like.get(name)
        )
        raise UserError(
            f"{name} has other parts than this network: {', '.join(differing[:4])} differ even at its widths.",
            why="Widths and heads can be taken over; tokens, patch size and layer scales cannot.",
            fix="Name a smaller model of the same kind.",
        )
    if "qk_v" not in components:
        return widths
    channels = {n: size for n, size in widths.channels.items() if n not in widths.num_heads}
    separate = {f"{n}.{part}": widths.channels[n] for n in widths.num_heads for part in ("qk", "v")}
    return Widths({**channels, **separate}, widths.num_heads)
