"""Depth: which blocks can leave, one after another, and what that does to the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from upvits.calib_data.progress import watched
from upvits.toolchain.families import segments_of
from upvits.toolchain.networks.depth import DepthPath, all_blocks, shorten, shorter
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.divergence import device_of, divergence
from upvits.toolchain.structure.segments import Segment

Pairs = tuple[tuple[int, int], ...]


def depth_paths(model: nn.Module, batches: Sequence[Tensor], scale: float | None, quiet: bool) -> dict[str, DepthPath]:
    """Greedy removal from every list of blocks, all other lists whole.

    Each step takes out the block, or shifted block (the FFN of one and the attention of the next, UP-ViTs,
    arXiv 2111.15127, section 3.2), without which the shortened network is closest to the dense one: joint exact KL,
    not a sum of scores. A candidate is run from its first changed block on.

    Args:
        model: the dense network in eval mode.
        batches: proxy images; their streams in front of every block are kept in memory.
        scale: see `divergence`.
        quiet: no progress bar.
    """
    with torch.inference_mode():
        images = [batch.to(device_of(model)) for _, batch in shared().mine(batches)]
        dense = [model(batch) for batch in images]
        own = torch.tensor(float(sum(map(len, images))))
        shared().sum(own)
        return {
            name: _path(model, name, pairs, images, dense, scale, int(own), quiet)
            for name, pairs in all_blocks(model).items()
        }


def _path(
    model: nn.Module,
    name: str,
    pairs: Pairs,
    images: Sequence[Tensor],
    dense: Sequence[Tensor],
    scale: float | None,
    count: int,
    quiet: bool,
) -> DepthPath:
    steps: list[Pairs] = []
    losses: list[float] = []
    total = sum(2 * size - 1 for size in range(2, len(pairs) + 1))
    progress = iter(watched(range(total), f"Scoring depth ({name})", quiet=quiet))
    first = _first_segment(segments_of(model), name)
    streams = [[batch] for batch in images]  # per batch: what enters segments 0, 1, ... of the network as it is now
    short = model
    while candidates := shorter(pairs):
        _extend(streams, segments_of(short), first + len(pairs))
        sums = torch.zeros(len(candidates), dtype=torch.float64)
        for index, candidate in enumerate(candidates):
            next(progress, None)
            changed = first + _agree(pairs, candidate)
            segments = segments_of(shorten(model, {name: candidate}))[changed:]
            outputs = [_run(segments, kept[changed]) for kept in streams]
            sums[index] = sum(float(divergence(a, b, scale).sum()) for a, b in zip(dense, outputs, strict=True))
        shared().sum(sums)
        loss, best = min(zip((sums / count).tolist(), candidates, strict=True), key=lambda entry: entry[0])
        streams = [kept[: first + _agree(pairs, best) + 1] for kept in streams]
        pairs, short = best, shorten(model, {name: best})
        steps.append(pairs)
        losses.append(loss)
    next(progress, None)  # lets the bar close
    return DepthPath(tuple(steps), tuple(losses))


def _first_segment(segments: Sequence[Segment], name: str) -> int:
    return next(index for index, segment in enumerate(segments) if segment.name == f"{name}.0")


def _agree(a: Pairs, b: Pairs) -> int:
    """How many leading blocks are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _extend(streams: Sequence[list[Tensor]], segments: Sequence[Segment], upto: int) -> None:
    """Run on until the stream that enters segment `upto` is known too."""
    for kept in streams:
        while len(kept) <= upto:
            kept.append(segments[len(kept) - 1].run(kept[-1]))


def _run(segments: Sequence[Segment], stream: Tensor) -> Tensor:
    for segment in segments:
        stream = segment.run(stream)
    return stream
