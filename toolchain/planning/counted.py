"""Multiply-accumulates or parameters as additive costs, from counts of narrowed networks.

Nothing is derived on paper: a handful of networks with other widths, one block per list, are counted on the meta device
module by module, and polynomials are put through the counts. A branch's cost is a sum of terms in its widths and the
stream's (matrix products are bilinear, PVTv2's spatial reduction is square in the stream), so the fit is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from upvits.toolchain.families import family_of, groups_of, narrow, skeleton
from upvits.toolchain.networks.depth import shorten
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.structure.groups import ChannelGroup, Widths
from upvits.toolchain.structure.macs import flop_counter

_NETWORKS = 10  # more than the terms of any part, so that the fit can be seen to be one
_WIDEST = 16  # widths (per head) that are counted go up to this, at least
_PARTS = {"attn": ("attn", "norm1", "ls1"), "mlp": ("mlp", "norm2", "ls2")}  # timm's names; what a block lacks is zero


@dataclass(frozen=True, slots=True)
class CountedCosts:
    """Costs (see `toolchain.planning.costs`) by counting.

    Attributes:
        unit: `MACs` of one image, or `parameters`.
        embeds: embed groups in the order of the network.
        outside: coefficients of what is no branch, over `_outside_terms`.
        branches: attention or FFN group -> coefficients over `_branch_terms`.
    """

    unit: str
    embeds: tuple[str, ...]
    outside: NDArray[np.float64]
    branches: dict[str, NDArray[np.float64]]

    def fixed(self, dims: Mapping[str, int]) -> float:
        """Embeddings, norms and head, given the width of every `embed` group."""
        return round(float(self.outside @ _outside_terms([dims[name] for name in self.embeds])))

    def branch(self, group: str, dim: int, width: tuple[int, int]) -> float:
        """One branch at a width of the stream, see `Costs.branch`."""
        return round(float(self.branches[group] @ _branch_terms(dim, width)))


def _outside_terms(dims: Sequence[int]) -> NDArray[np.float64]:
    """1, every width, and every product of neighbours (a stage's embedding reads the stage before)."""
    pairs = [a * b for a, b in pairwise(dims)]
    return np.array([1, *dims, *pairs], dtype=np.float64)


def _branch_terms(dim: int, width: tuple[int, int]) -> NDArray[np.float64]:
    first, second = width
    return np.array([1, dim, dim * dim, first, second, dim * first, dim * second], dtype=np.float64)


def count_costs(
    model: nn.Module, unit: Literal["MACs", "parameters"] = "MACs", input_size: tuple[int, int, int] | None = None
) -> CountedCosts:
    """The costs of a network and of its relatives with other widths.

    Args:
        model: a network of a supported family.
        unit: what is counted.
        input_size: (channels, height, width) in pixels; the model's own by default.
    """
    lists = family_of(model).block_lists(model)
    hollow = shorten(skeleton(model), dict.fromkeys(lists, ((0, 0),)))  # the blocks of a list are of one kind
    groups = groups_of(hollow)
    shape = input_size or preprocess_of(model).input_size
    embeds = tuple(group.name for group in groups if group.kind == "embed")
    stream = {group.stage: group.name for group in groups if group.kind == "embed"}
    branches = {g.module: stream[g.stage] for g in groups if g.kind in ("qk", "ffn")}
    generator = np.random.default_rng(0)
    rows: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("", *branches)}  # "" for what is no branch
    counts: dict[str, list[float]] = {name: [] for name in ("", *branches)}
    for _ in range(_NETWORKS):
        widths = _random_widths(groups, generator)
        network = narrow(hollow, widths)
        count = _macs_by_module(network, shape) if unit == "MACs" else _parameters_by_module(network)
        for name, embed in branches.items():
            block, _, part = name.rpartition(".")
            rows[name].append(_branch_terms(widths.channels[embed], _width(name, widths)))
            counts[name].append(sum(count(f"{block}.{module}") for module in _PARTS[part]))
        rows[""].append(_outside_terms([widths.channels[name] for name in embeds]))
        counts[""].append(count("") - sum(counts[name][-1] for name in branches))
    fitted = {name: _through(np.stack(rows[name]), np.array(counts[name]), name) for name in rows}
    every_block = {
        f"{listed}.{index}.{part}": fitted[f"{listed}.0.{part}"]
        for listed, length in lists.items()
        for index in range(length)
        for part in _PARTS
    }
    return CountedCosts(unit, embeds, fitted[""], every_block)


def _width(name: str, widths: Widths) -> tuple[int, int]:
    """Width of a branch as `Costs.branch` takes it."""
    sizes = widths.channels
    return (sizes[name], 0) if name in sizes else (sizes[f"{name}.qk"], sizes[f"{name}.v"])


def _random_widths(groups: Sequence[ChannelGroup], generator: np.random.Generator) -> Widths:
    channels, num_heads = {}, {}
    for group in groups:
        if group.kind in ("embed", "ffn", "qk", "v"):
            # at least 16 values: where the block is narrow itself, its terms could not be told apart
            dims = int(generator.integers(1, max(_WIDEST, group.head_dim) + 1))
            channels[group.name] = dims * group.num_heads
            if group.kind == "qk":
                num_heads[group.module] = group.num_heads
    return Widths(channels, num_heads)


def _macs_by_module(network: nn.Module, shape: tuple[int, int, int]) -> Callable[[str], float]:
    network.eval()
    with flop_counter() as counter, torch.inference_mode():
        network(torch.empty(1, *shape, device="meta"))
    flops = counter.get_flop_counts()
    top = type(network).__name__
    return lambda name: sum(flops.get(f"{top}.{name}" if name else "Global", {}).values()) // 2


def _parameters_by_module(network: nn.Module) -> Callable[[str], float]:
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return lambda module: sum(n for name, n in sizes.items() if not module or name.startswith(f"{module}."))


def _through(rows: NDArray[np.float64], counts: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Coefficients of the polynomial through the counts."""
    scale = np.maximum(rows.max(axis=0), 1)
    result: NDArray[np.float64] = np.linalg.lstsq(rows / scale, counts, rcond=1e-12)[0] / scale
    used = rows.any(axis=0)
    told_apart = np.linalg.matrix_rank((rows / scale)[:, used]) == used.sum()
    if not told_apart or np.abs(rows @ result - counts).max() > 0.5:
        raise RuntimeError(f"the costs of {name or 'the network'} are no polynomial of its widths")
    return result
