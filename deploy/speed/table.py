"""What each part of a network costs on one runtime: a table of measured points, kept between runs.

Latency as a sum over layers that were measured one by one is how HALP (arXiv 2110.10811) and NetAdapt (arXiv
1804.03230) plan. A point here is one branch of a block at one width of the stream and of its own, as a small graph of
the real modules that the runtime built. The sum is only nearly the latency of the whole, so it is scaled to the dense
network's, and whatever is planned with it is built and timed in the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn

from upvits.calib_data import Preprocess
from upvits.calib_data.cache import cache_folder
from upvits.calib_data.documents import Name, Number, Text, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import watched
from upvits.deploy.speed.chains import Part, Stage, chain, grid, stages_of, without_blocks
from upvits.deploy.speed.deployment import Baseline, Deployment, opened, shares, stream_preprocess, with_random_weights
from upvits.deploy.store.artifacts import atomic_write, canonical_digest
from upvits.deploy.store.disk import disk_errors
from upvits.toolchain.families import groups_of
from upvits.toolchain.planning.costs import Costs
from upvits.toolchain.planning.counted import CountedCosts, count_costs

_REPEATS = 4  # of a branch in a row; its norm and addition are then fused as in a network
_DIM_SHARES = (1.0, 0.5)
_WIDTH_SHARES = (1.0, 0.5, 0.25)
_FIXED_SHARES = (1.0, 0.75, 0.5)
_PARTS: tuple[Part, ...] = ("attn", "mlp")

Milliseconds = NDArray[np.float64]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Point(_Document):
    """Time of one small graph in shares of the dense network's: median, 10th and 90th percentile over rounds."""

    share: Number
    low: Number
    high: Number


class TableFile(_Document):
    """Measured points by name, and what they hold for."""

    format_version: Literal[1] = 1
    facts: dict[Name, Text]
    points: dict[Name, Point] = {}


@dataclass(frozen=True, slots=True)
class Grid:
    """Milliseconds of a branch at measured widths of the stream and of its own, both ascending, [dims, widths]."""

    dims: tuple[int, ...]
    widths: tuple[int, ...]
    ms: Milliseconds


@dataclass(frozen=True, slots=True)
class LatencyCosts:
    """Milliseconds of the parts of a network, linear between measured points (`toolchain.planning.costs.Costs`).

    Attributes:
        dense_ms: the dense network's time, which is the sum of its parts.
        macs: multiply-accumulates of the parts; embeddings, norms and head are interpolated over theirs.
        fixed_points: those MACs and milliseconds at measured widths, by rising MACs.
        branches: by list of blocks and branch, `blocks.attn`.
        points: what was measured, in shares of the dense network's time.
    """

    dense_ms: float
    macs: CountedCosts
    fixed_points: tuple[tuple[float, float], ...]
    branches: Mapping[str, Grid]
    points: Mapping[str, Point]
    unit: str = "ms"

    def fixed(self, dims: Mapping[str, int]) -> float:
        """Embeddings, norms and head, given the width of every `embed` group."""
        macs, ms = zip(*self.fixed_points, strict=True)
        return max(0.0, _between(macs, ms, self.macs.fixed(dims)))

    def branch(self, group: str, dim: int, width: tuple[int, int]) -> float:
        """One branch with its norm and its addition to the stream; see `Costs`.

        q·k dims and v dims take equally much arithmetic each, so unequal ones cost the mean of both.
        """
        blocks, _, part = group.rsplit(".", 2)
        grid, widths = self.branches[f"{blocks}.{part}"], width if part == "attn" else width[:1]
        rows = [[_between(grid.widths, row, units) for row in grid.ms.tolist()] for units in widths]
        return max(0.0, sum(_between(grid.dims, row, dim) for row in rows) / len(rows))


def costs_from(
    points: Mapping[str, Point], model: nn.Module, input_size: tuple[int, int, int], dense_ms: float, align: int
) -> LatencyCosts:
    """Costs from measured points, scaled so that the parts of the dense network add up to its time."""
    macs, stages = count_costs(model, "MACs", input_size), stages_of(model, input_size)
    known = sorted((macs.fixed(dims), points[_fixed_name(dims)].share) for dims in fixed_dims(stages, align))
    fixed = np.maximum.accumulate([share for _, share in known])
    tables, whole = {}, 0.0
    for stage in stages:
        for part in _PARTS:
            dims, widths = branch_grid(stage, part, align)
            measured = [[points[_branch_name(stage, part, d, w)].share for w in widths] for d in dims]
            share = np.maximum(np.array(measured) - points[_call_name(stage)].share, 1e-6) / _REPEATS
            # noise must not make narrow ones dearer: what is wider in both directions bounds them
            share = np.minimum.accumulate(np.minimum.accumulate(share[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
            tables[f"{stage.blocks}.{part}"] = Grid(dims, widths, share)
            whole += stage.count * float(share[-1, -1])
    scale = dense_ms * max(0.0, 1 - float(fixed[-1])) / whole
    return LatencyCosts(
        dense_ms=dense_ms,
        macs=macs,
        fixed_points=tuple((count, dense_ms * share) for (count, _), share in zip(known, fixed.tolist(), strict=True)),
        branches={name: Grid(table.dims, table.widths, scale * table.ms) for name, table in tables.items()},
        points=points,
    )


def predicted(costs: Costs, network: nn.Module) -> float:
    """What a network costs as the sum of its parts, in the unit of the costs."""
    groups = {group.name: group for group in groups_of(network)}
    dims = {group.stage: (group.name, group.size) for group in groups.values() if group.kind == "embed"}
    total = costs.fixed(dict(dims.values()))
    for group in groups.values():
        if group.kind == "ffn":
            attention = group.name.removesuffix("mlp") + "attn"
            queries, values = (groups.get(f"{attention}.{part}") for part in ("qk", "v"))
            joint = groups.get(attention)
            width = (joint.size, joint.size) if joint else (queries.size, values.size) if queries and values else (0, 0)
            total += costs.branch(attention, dims[group.stage][1], width)
            total += costs.branch(group.name, dims[group.stage][1], (group.size, 0))
    return total


def measure_table(dense: Baseline, *, align: int = 8, quiet: bool = True) -> LatencyCosts:
    """The latency table of a network, from the cache as far as it is there; what is missing is measured and kept.

    Args:
        dense: the network; every point is timed in turns with it.
        align: widths that may be asked for are multiples of this.
        quiet: no progress bar.

    Raises:
        UserError: the cache folder cannot be written.
        BuildError: the runtime refused a part of the network.
    """
    model, size, deployment = dense.model, dense.preprocess.input_size, dense.deployment
    path, table = _load(model, dense.preprocess, deployment)
    groups = _groups(model, stages_of(model, size), dense.preprocess, align)
    threads = int(dense.session.settings.get("intra_op_threads", 0)) or None
    points = dict(table.points)
    missing = [todo for group in groups if (todo := {name: make for name, make in group.items() if name not in points})]
    for todo in watched(missing, f"latency of layers ({deployment.runtime.name})", quiet=quiet, total=len(missing)):
        networks = {name: make() for name, make in todo.items()}
        sizes = {"dense": size, **{name: preprocess.input_size for name, (_, preprocess) in networks.items()}}
        with opened(deployment, networks, threads) as sessions:
            ratios = shares({"dense": dense.session, **sessions}, sizes, deployment)
        for name in networks:
            low, middle, high = np.percentile(ratios[name], (10, 50, 90)).tolist()
            points[name] = Point(share=middle, low=low, high=high)
        with disk_errors(path.parent, "the latency table"):
            atomic_write(path, TableFile(facts=table.facts, points=points).model_dump_json(indent=1).encode())
    return costs_from(points, model, size, dense.ms, align)


def tables_folder() -> Path:
    """The folder of the tables, made if need be.

    Raises:
        UserError: nothing can be written there.
    """
    folder = cache_folder() / "latency"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"The latency table cannot be kept in {folder}: {error.strerror or error}.",
            why="Measured latencies of layers are kept there for the next run.",
            fix="Name a folder that you may write to in the environment variable UPVITS_DEPLOY_CACHE.",
        ) from error
    return folder


def spread(costs: LatencyCosts) -> float:
    """Median over points of their 10th to 90th percentile range, in shares of the point."""
    return median((point.high - point.low) / max(point.share, 1e-9) for point in costs.points.values())


def branch_grid(stage: Stage, part: Part, align: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths of the stream and of a branch that are measured, ascending."""
    heads = stage.heads if part == "attn" else 1
    widths = tuple(heads * width for width in grid(stage.widths[part] // heads, _WIDTH_SHARES, align))
    return grid(stage.dim, _DIM_SHARES, align), widths


def fixed_dims(stages: Sequence[Stage], align: int) -> list[dict[str, int]]:
    """Widths of all `embed` groups at which embeddings, norms and head are measured."""
    choices = [{s.embed: grid(s.dim, (share,), align)[0] for s in stages} for share in _FIXED_SHARES]
    return [dims for number, dims in enumerate(choices) if dims not in choices[:number]]


_Made = tuple[nn.Module, Preprocess]


def _groups(
    model: nn.Module, stages: Sequence[Stage], preprocess: Preprocess, align: int
) -> list[dict[str, Callable[[], _Made]]]:
    """Networks to time by the name of their point; those of a group take turns."""
    groups: list[dict[str, Callable[[], _Made]]] = [
        {_fixed_name(dims): partial(_fixed_network, model, dims, preprocess) for dims in fixed_dims(stages, align)}
    ]
    for stage in stages:
        call = partial(_chain_network, model, stage, "attn", stage.dim, stage.widths["attn"], 0)
        groups.append({_call_name(stage): call})
        for part in _PARTS:
            dims, widths = branch_grid(stage, part, align)
            groups[-1] |= {
                _branch_name(stage, part, d, w): partial(_chain_network, model, stage, part, d, w, _REPEATS)
                for d in dims
                for w in widths
            }
    return groups


def _fixed_network(model: nn.Module, dims: Mapping[str, int], preprocess: Preprocess) -> _Made:
    return with_random_weights(without_blocks(model, dims)), preprocess


def _chain_network(model: nn.Module, stage: Stage, part: Part, dim: int, width: int, repeats: int) -> _Made:
    return chain(model, stage, part, dim, width, repeats), stream_preprocess((*stage.size[:2], dim))


def _fixed_name(dims: Mapping[str, int]) -> str:
    return "fixed " + ",".join(f"{name}={dim}" for name, dim in sorted(dims.items()))


def _call_name(stage: Stage) -> str:
    return f"{stage.blocks} call"


def _branch_name(stage: Stage, part: Part, dim: int, width: int) -> str:
    return f"{stage.blocks} {part} {dim}x{width}"


def _load(model: nn.Module, preprocess: Preprocess, deployment: Deployment) -> tuple[Path, TableFile]:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    heads = {group.name: group.num_heads for group in groups_of(model)}
    facts = {
        **deployment.facts(),
        "repeats": str(_REPEATS),
        "architecture": canonical_digest(
            {"class": type(model).__name__, "input": preprocess.input_size, "shapes": shapes, "heads": heads}
        ),
    }
    folder = tables_folder()
    name = f"{deployment.runtime.name}-{deployment.precision}-b{deployment.batch}-{canonical_digest(facts)[:16]}.json"
    try:
        table = read_document(folder / name, TableFile, fix="")
    except UserError:  # none yet, or a broken one: measured again
        table = TableFile(facts=facts)
    return folder / name, table if table.facts == facts else TableFile(facts=facts)


def _between(known: Sequence[float], values: Sequence[float], at: float) -> float:
    """Linear between known points, and beyond them on the line through the last two."""
    if len(known) == 1:
        return float(values[0])
    place = int(np.clip(np.searchsorted(known, at), 1, len(known) - 1))
    left, right = known[place - 1], known[place]
    return float(values[place - 1] + (values[place] - values[place - 1]) * (at - left) / (right - left))
