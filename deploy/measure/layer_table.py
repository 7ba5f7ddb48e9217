"""Layers of two models side by side: which layer of the pruned model is which of the dense one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from upvits.deploy.measure.document import Layer
from upvits.deploy.runtimes.interface import LayerTime


def layer_table(dense: Sequence[LayerTime], pruned: Sequence[LayerTime]) -> list[Layer]:
    """Put the layers of two models side by side, in order of execution of the dense one.

    Layers belong together when a name of an ONNX node in them is the same; between two such pairs, the others are
    paired by kind and position. What stays alone has None for the other model, at the place where it runs.
    """
    partner = _partners(dense, pruned)
    taken = set(partner.values())
    table: list[Layer] = []
    shown = 0
    for index, layer in enumerate(dense):
        other = partner.get(index)
        if other is not None:
            table += [_row(None, pruned[i]) for i in range(shown, other) if i not in taken]
            shown = max(shown, other + 1)
        table.append(_row(layer, None if other is None else pruned[other]))
    return table + [_row(None, pruned[i]) for i in range(shown, len(pruned)) if i not in taken]


def _partners(dense: Sequence[LayerTime], pruned: Sequence[LayerTime]) -> dict[int, int]:
    """Positions in `pruned` by positions in `dense`."""
    places: dict[str, list[int]] = {}
    for index, layer in enumerate(pruned):
        for name in _node_names(layer.name):
            places.setdefault(name, []).append(index)
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for index, layer in enumerate(dense):
        free = (p for name in _node_names(layer.name) for p in places.get(name, []) if p not in taken)
        if (match := next(free, None)) is not None:
            partner[index] = match
            taken.add(match)
    partner |= dict(_by_position(dense, pruned, partner))
    return partner


def _by_position(
    dense: Sequence[LayerTime], pruned: Sequence[LayerTime], partner: Mapping[int, int]
) -> Iterator[tuple[int, int]]:
    """Pair what is left between two named pairs, by kind."""
    taken, start = set(partner.values()), 0
    waiting: list[int] = []
    for index in range(len(dense) + 1):
        if index < len(dense) and index not in partner:
            waiting.append(index)
            continue
        end = partner[index] if index < len(dense) else len(pruned)
        free = [i for i in range(start, end) if i not in taken]
        for alone in waiting:
            match = next((i for i in free if pruned[i].op == dense[alone].op), None)
            if match is not None:
                free.remove(match)
                yield alone, match
        waiting, start = [], max(start, end + 1)


def _node_names(name: str) -> list[str]:
    """The whole name, then the names of nodes in it: runtimes join those of fused ones with +, commas or brackets."""
    return list(dict.fromkeys([name, *re.split(r"[\s+,\[\]{}()|]+", name)])) if name else []


def _row(dense: LayerTime | None, pruned: LayerTime | None) -> Layer:
    named = dense or pruned
    assert named is not None
    return Layer(
        name=named.name,
        op=named.op,
        dense_ms=dense.ms if dense else None,
        pruned_ms=pruned.ms if pruned else None,
    )
