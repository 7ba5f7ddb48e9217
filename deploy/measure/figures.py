"""From measurements to figures of the report: pairs of dense and pruned, and what to deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from upvits.deploy.measure.accuracy import Accuracy
from upvits.deploy.measure.bench import LatencyReport
from upvits.deploy.measure.diagnosis import Measured, diagnose
from upvits.deploy.measure.document import Bench, Best, Finding, Latency, LayerTimes
from upvits.deploy.measure.layer_table import layer_table
from upvits.deploy.runtimes import Engine, LayerTime
from upvits.toolchain.planning import PruningPlan

_MOST_ROUNDS = 0.75
_WIDE_TO_NARROW = ("fp32", "bf16", "fp16", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class EnginePair:
    """The dense and the pruned engine of one runtime in one precision, which are measured against each other."""

    runtime: str
    precision: str

    def session(self, model: str) -> str:
        """Name of the session of one network, for example "dense onnxruntime fp32"."""
        return f"{model} {self.runtime} {self.precision}"


def bench_figures(
    measured: LatencyReport | None,
    pairs: Sequence[EnginePair],
    costs: Mapping[str, Accuracy],
    max_drop: float,
    joules: Mapping[tuple[str, int], float | None],
) -> Bench:
    """Arrange measurements for the report.

    Args:
        measured: holds both sessions of every pair; None when nothing runs here.
        pairs: what was measured.
        costs: accuracy by session name.
        max_drop: points of accuracy that a precision may cost the pruned network.
        joules: energy per image by session name and batch size, where it was measured.
    """
    figures = Bench()
    if measured is None:
        return figures
    for pair in pairs:
        names = {model: pair.session(model) for model in ("dense", "pruned")}
        for model, tree in (("dense", figures.dense), ("pruned", figures.pruned)):
            tree.setdefault(pair.runtime, {})[pair.precision] = {
                batch: _latency(measured, names[model], batch, joules.get((names[model], batch)))
                for batch in measured.stats[names[model]]
            }
        for batch in measured.stats[names["pruned"]]:
            ratio = measured.ratio(names["dense"], names["pruned"], batch)
            for part, table in (
                ("median", figures.speedup),
                ("low", figures.speedup_low),
                ("high", figures.speedup_high),
            ):
                by_precision = table.setdefault(pair.runtime, {}).setdefault(pair.precision, {})
                by_precision[batch] = round(getattr(ratio, part), 3)
    runtimes = dict.fromkeys(pair.runtime for pair in pairs)
    return figures.model_copy(
        update={"best": [_best(measured, [p for p in pairs if p.runtime == r], costs, max_drop) for r in runtimes]}
    )


def layer_figures(pair: EnginePair, batch: int, dense: Sequence[LayerTime], pruned: Sequence[LayerTime]) -> LayerTimes:
    """Profiles of both networks, side by side."""
    return LayerTimes(runtime=pair.runtime, precision=pair.precision, batch=batch, layers=layer_table(dense, pruned))


def findings(
    figures: Bench,
    plan: PruningPlan,
    engines: Mapping[EnginePair, tuple[Engine, Engine]],
    layers: Mapping[EnginePair, tuple[Sequence[LayerTime], Sequence[LayerTime]]],
) -> list[Finding]:
    """Why latency fell less than the MACs did, in the runtime and precision that is the fastest."""
    best = min(figures.best, key=lambda best: best.pruned_ms, default=None)
    if best is None:
        return []
    pair, batch = EnginePair(best.runtime, best.precision), best.batch
    widths = (
        {change.group: change.before for change in plan.changes},
        {change.group: change.after for change in plan.changes if change.after},
    )
    head_dims = (plan.dense_widths.head_dims, plan.widths.head_dims)
    sides = (
        (plan.before, widths[0], head_dims[0], figures.dense),
        (plan.after, widths[1], head_dims[1], figures.pruned),
    )
    dense, pruned = (
        Measured(
            macs=cost.macs,
            latency=latencies[pair.runtime][pair.precision][batch],
            layers=own_layers,
            built=engine.built,
            widths=channels,
            head_dims=dims,
            threads=latencies[pair.runtime][pair.precision][batch].threads,
        )
        for (cost, channels, dims, latencies), own_layers, engine in zip(
            sides, layers[pair], engines[pair], strict=True
        )
    )
    speedup = figures.speedup[pair.runtime][pair.precision][batch]
    return diagnose(dense, pruned, runtime=pair.runtime, precision=pair.precision, batch=best.batch, speedup=speedup)


def _best(measured: LatencyReport, pairs: Sequence[EnginePair], costs: Mapping[str, Accuracy], max_drop: float) -> Best:
    """The precision of a runtime to deploy, at the largest batch, and why not the others.

    A narrower precision must earn its place: it keeps the accuracy, and is faster in at least three of four rounds. Two
    that are equally fast would show that by chance once in 50 times (sign test over 20 rounds).
    """
    batch = max(measured.stats[pairs[0].session("pruned")])
    pairs = sorted(pairs, key=lambda pair: _WIDE_TO_NARROW.index(pair.precision))
    drops = {pair: costs[pair.session("pruned")].drop for pair in pairs}
    held = [pair for pair in pairs if not costs[pair.session("pruned")].loses_more_than(max_drop)]
    right = held or [min(pairs, key=lambda pair: drops[pair])]
    best = right[0]
    for pair in right[1:]:
        current, candidate = (np.array(measured.rounds[p.session("pruned")][batch]) for p in (best, pair))
        if np.mean(candidate < current) >= _MOST_ROUNDS:
            best = pair
    passed_over = {}
    for pair in (pair for pair in pairs if pair != best):
        ratio = measured.ratio(best.session("pruned"), pair.session("pruned"), batch)
        passed_over[pair.precision] = (
            f"loses {drops[pair]:.2f} points, {max_drop:g} are allowed"
            if pair not in right
            else f"{ratio.median:.2f}x the speed of {best.precision} ({ratio.low:.2f} to {ratio.high:.2f} over rounds)"
        )
    widest = pairs[0]
    ratio = measured.ratio(widest.session("dense"), best.session("pruned"), batch)
    return Best(
        runtime=best.runtime,
        precision=best.precision,
        batch=batch,
        dense_precision=widest.precision,
        dense_ms=measured.stats[widest.session("dense")][batch].median,
        pruned_ms=measured.stats[best.session("pruned")][batch].median,
        speedup=round(ratio.median, 3),
        low=round(ratio.low, 3),
        high=round(ratio.high, 3),
        passed_over=passed_over,
    )


def _latency(measured: LatencyReport, name: str, batch: int, joules: float | None) -> Latency:
    stats = measured.stats[name][batch]
    threads = measured.sessions[name].get("intra_op_threads")
    return Latency(
        min=stats.min,
        median=stats.median,
        mean=stats.mean,
        p90=stats.p90,
        p95=stats.p95,
        p99=stats.p99,
        cv=stats.cv,
        images_per_s=stats.images_per_second,
        n=stats.iterations,
        unstable=stats.unstable,
        quantiles=list(stats.quantiles),
        threads=None if threads is None else int(threads),
        h2d=stats.h2d,
        compute=stats.compute,
        d2h=stats.d2h,
        enqueue=stats.enqueue,
        joules_per_image=joules,
    )
