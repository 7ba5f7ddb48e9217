"""Which widths kernels like: matrix products and attention over widths, grouped by the power of two that divides them.

Pruning rounds widths to multiples of 8 by default. If a width that is no multiple of 8 costs more per multiplication
than the next one that is, the rounding is free; if only multiples of 32 are fast, it is too fine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 197
HEADS = 12
_CLASSES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Point:
    """One width.

    Attributes:
        kind: "attention" (width is head_dim), "embed" (a square product) or "ffn" (embedding to `width` units).
        base: widths around this one are compared with each other.
        aligned: the largest power of two up to 64 that divides the width.
        ms: median of a call.
        ps_per_mac: the same by multiply-accumulate, in picoseconds.
    """

    kind: str
    base: int
    width: int
    aligned: int
    ms: float
    ps_per_mac: float


def sweep(device: str, dtype: torch.dtype, batch: int, *, quick: bool = False, seconds: float = 0.05) -> list[Point]:
    """Time every width; `quick` takes a few only."""
    points = []
    for kind, base, width in _widths(quick):
        call, macs = _work(kind, base, width, batch, dtype, device)
        ms = _median_ms(call, device, seconds)
        points.append(Point(kind, base, width, aligned_to(width), ms, ms * 1e9 / macs))
    return points


def aligned_to(width: int) -> int:
    """The largest power of two up to 64 that divides a width."""
    return max(size for size in _CLASSES if width % size == 0)


def cost_by_alignment(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Median cost per multiply-accumulate by kind and alignment, relative to the best aligned widths of the same base.

    1.3 means: such widths take 30 % more time for the same arithmetic.
    """
    costs: dict[str, dict[int, list[float]]] = {}
    for group in {(point.kind, point.base) for point in points}:
        own = [point for point in points if (point.kind, point.base) == group]
        best = max(point.aligned for point in own)
        reference = float(np.median([point.ps_per_mac for point in own if point.aligned == best]))
        for point in own:
            costs.setdefault(point.kind, {}).setdefault(point.aligned, []).append(point.ps_per_mac / reference)
    return {
        kind: {str(aligned): round(float(np.median(by[aligned])), 3) for aligned in sorted(by)}
        for kind, by in sorted(costs.items())
    }


def rounding_up_pays(points: Sequence[Point], multiple: int) -> dict[str, float]:
    """Share of widths off a multiple that take at least as long as the next width on it, by kind."""
    wins: dict[str, list[bool]] = {}
    for point in points:
        on = [p for p in points if (p.kind, p.base) == (point.kind, point.base) and p.width % multiple == 0]
        above = min((p for p in on if p.width > point.width), key=lambda p: p.width, default=None)
        if point.width % multiple and above is not None:
            wins.setdefault(point.kind, []).append(point.ms >= above.ms)
    return {kind: round(sum(found) / len(found), 3) for kind, found in sorted(wins.items())}


def _widths(quick: bool) -> Iterable[tuple[str, int, int]]:
    if quick:
        yield from (("attention", 32, 8), ("attention", 32, 12), ("attention", 32, 16), ("attention", 32, 32))
        yield from (("embed", 64, 60), ("embed", 64, 64), ("ffn", 64, 250), ("ffn", 64, 256))
        return
    for width in (*range(8, 33, 2), *range(36, 65, 4), 63, 65, *range(72, 129, 8)):
        yield "attention", 32 if width <= 32 else 64 if width <= 64 else 128, width
    for base in (96, 192, 384, 768):
        around = (-32, -24, -16, -12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 4, 8, 16, 24, 32)
        yield from (("embed", base, base + step) for step in around)
        yield from (("ffn", base, 4 * base + step) for step in (*around, -64, 64))


def _work(
    kind: str, base: int, width: int, batch: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], Tensor], int]:
    """A call to time, and its multiply-accumulates."""
    if kind == "attention":
        q, k, v = (torch.randn(batch, HEADS, TOKENS, width, dtype=dtype, device=device) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v), 2 * batch * HEADS * TOKENS**2 * width
    inner = width if kind == "embed" else base
    x = torch.randn(batch * TOKENS, inner, dtype=dtype, device=device)
    weight = torch.randn(width, inner, dtype=dtype, device=device)
    return lambda: F.linear(x, weight), batch * TOKENS * inner * width


@torch.inference_mode()
def _median_ms(call: Callable[[], Tensor], device: str, seconds: float) -> float:
    """Median over chunks of calls of the mean in a chunk: a kernel alone is too short for a clock."""
    for _ in range(3):
        call()
    chunk = 20 if device == "cuda" else 1
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < seconds:
        times.append(_chunk_ms(call, device, chunk))
    return float(np.median(times))


def _chunk_ms(call: Callable[[], Tensor], device: str, chunk: int) -> float:
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(chunk):
            call()
        return (time.perf_counter() - started) * 1e3 / chunk
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # Without this the GPU waits for the host between short kernels, and the host is what gets timed.
    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(chunk):
        call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / chunk
