"""What stands at the top of every view: a few large figures, and what fell short."""

from __future__ import annotations

from dataclasses import dataclass

from upvits.deploy.measure.bench import UNSTABLE_CV
from upvits.deploy.report.document import BuiltFigures, Report
from upvits.deploy.report.verdict import change_range, comparisons, cost_of, headline, on_nvidia, shortfall, small_proxy
from upvits.deploy.report.views.results import engine_bytes, measured, precisions
from upvits.deploy.report.views.section import inline, short_count, signed, three_digits


@dataclass(frozen=True, slots=True)
class Tile:
    """One large figure: its name, how it reads, the raw value, and two small lines."""

    name: str
    text: str
    value: float | None
    details: tuple[str, ...]
    fell_short: bool = False


def subject(report: Report) -> str:
    """What the report is about, in a line."""
    asked = f"ratio {report.ratio:g}" if report.ratio is not None else ""
    if report.plan is not None:  # how it was done is told further down
        asked = inline(
            {name: value for name, value in report.plan.asked.items() if name not in ("align", "components")}
        )
        asked += f", planner {report.plan.planner}" if report.plan.planner != "uniform" else ""
    return f"Model {report.model}, weights {report.weights}, data {report.data}, {asked or 'no pruning asked for'}."


def tiles(report: Report) -> list[Tile]:
    """Speed, accuracy, size, work and gates."""
    return [_speed(report), _accuracy(report), _size(report), _work(report), _gates(report)]


def shortcomings(report: Report) -> list[str]:
    """Which goals were missed and what was not measured, most important first."""
    return [
        *(f"Gate failed: {p.model}, {p.candidate} against {p.reference}, top-1 agreement {p.top1_agreement:.2f} %, "
          f"largest difference {p.max_abs:.1e}." for p in report.parity if not p.passed),
        *_guessing(report),
        *_missed_target(report),
        *_slow(report),
        *_small_proxy(report),
        *_unstable(report),
        *_built_short(report),
        *_unmeasured(report),
    ]  # fmt: skip


def planned_short(runtime: str, built: BuiltFigures) -> list[str]:
    """Where an engine has fewer low-precision products, or on GPUs fewer fused attention blocks, than were planned."""
    short = [
        f"{built.gemms.get(name, 0)} of {planned} {name} matrix products"
        for name, planned in built.planned.items()
        if name != "fp32" and built.gemms.get(name, 0) < planned
    ]
    if on_nvidia(runtime) and built.attention_fused is not None and built.attention_fused < built.attention_blocks:
        short.append(f"{built.attention_fused} of {built.attention_blocks} attention blocks fused")
    return short


def _guessing(report: Report) -> list[str]:
    """Whether the dense network is worse than always naming the most frequent class."""
    paired, dense = report.pruned.paired, report.dense.top1
    if paired is None or dense is None or dense > (share := 100 * paired.largest_class / paired.images):
        return []
    return [
        f"The dense network is right on {dense:.2f} % of the images; always naming the most frequent class would be "
        f"right on {share:.2f} %. What is said of accuracy here says nothing about your task."
    ]


def _missed_target(report: Report) -> list[str]:
    target = report.target
    if target is None or target.met or target.measured is None:
        return []
    timing = target.measured
    return [
        f"Target missed: {target.asked} asked for; {timing.ms:.3g} ms on {target.runtime} {target.precision} at batch "
        f"{target.batch}, {timing.speedup:.2f}x the dense speed ({timing.low:.2f} to {timing.high:.2f})."
    ]


def _small_proxy(report: Report) -> list[str]:
    groups = report.plan.unstable if report.plan else []
    if not groups:
        return []
    worst = min(groups, key=lambda group: group.overlap)
    return [small_proxy(len(groups), worst.group, worst.overlap)]


def _slow(report: Report) -> list[str]:
    head = headline(report)
    if head is None and comparisons(report):
        return ["Latency was measured, but nothing was chosen to deploy."]
    if head is None:
        return ["Latency was not measured: no engine of this run could run on the machine that made it."]
    where = f"{head.runtime} {head.precision} at batch {head.batch}"
    said = []
    if head.speedup < 1:
        said.append(f"Not faster: {head.speedup:.2f}x the dense speed on {where}.")
    elif head.low <= 1:
        said.append(f"Not certainly faster on {where}: the speed-up was {head.low:.2f} to {head.high:.2f} over rounds.")
    if report.findings or shortfall(report):
        gain = report.dense.macs / report.pruned.macs
        said.append(f"Latency fell less than the work did (MACs {gain:.2f}x): see \u201cWhy is it not faster?\u201d.")
    return said


def _unstable(report: Report) -> list[str]:
    pairs = comparisons(report)
    every = [latency for c in pairs for latency in (c.dense, c.pruned)]
    wild = [latency for latency in every if latency.unstable]
    if not wild:
        return []
    return [
        f"Unstable: {len(wild)} of {len(every)} latencies spread by more than {100 * UNSTABLE_CV:g} % (CV), up to "
        f"{100 * max(latency.cv for latency in wild):.1f} %: something else was running. "
        "Speed-ups are ratios within rounds; judge them by their range."
    ]


def _built_short(report: Report) -> list[str]:
    return [
        f"Built otherwise than planned: {e.model} {e.runtime} {e.precision}: {', '.join(short)}."
        for e in report.engines
        if e.built is not None and (short := planned_short(e.runtime, e.built))
    ]


def _unmeasured(report: Report) -> list[str]:
    if not comparisons(report):
        return []  # that nothing was measured is said already
    ran = {(runtime, precision) for runtime, precision, _, _ in measured(report.pruned.latency_ms)}
    idle: dict[str, list[str]] = {}
    for e in report.engines:
        if (e.runtime, e.precision) not in ran and e.precision not in idle.setdefault(e.runtime, []):
            idle[e.runtime].append(e.precision)
    return [
        f"Not measured here: {runtime} {', '.join(precisions)} was built, and did not run on this machine."
        for runtime, precisions in idle.items()
        if precisions
    ]


def _speed(report: Report) -> Tile:
    head = headline(report)
    if head is None and comparisons(report):
        return Tile("speed", "nothing chosen", None, ("latencies are below",), fell_short=True)
    if head is None:
        return Tile("speed", "not measured", None, ("no engine ran on this machine",), fell_short=True)
    return Tile(
        "faster" if head.speedup >= 1 else "the dense speed",
        f"{head.speedup:.2f}\N{MULTIPLICATION SIGN}",
        head.speedup,
        (
            f"{three_digits(head.dense_ms)} to {three_digits(head.pruned_ms)} ms, {precisions(head)}",
            f"{head.runtime}, batch {head.batch}",
        ),
        fell_short=head.speedup < 1,
    )


def _accuracy(report: Report) -> Tile:
    dense, pruned = report.dense.top1, report.pruned.top1
    head = headline(report)
    cost = cost_of(report, head) if head else None
    lowered = [f"{cost.precision} itself: {signed(-cost.drop)} points"] if cost and cost.precision != "fp32" else []
    if dense is not None and pruned is not None:
        change, paired = pruned - dense, report.pruned.paired
        details = [f"{dense:.2f} to {pruned:.2f} %, fine-tuned"]
        if paired is not None:
            low, high = change_range(paired)
            details.append(f"{signed(low)} to {signed(high)} with 95 % certainty, {paired.images:,} images")
        return Tile("points of top-1", signed(change), change, (*details, *lowered))
    if report.pruned.agreement is not None:
        same = report.pruned.agreement
        return Tile("same top-1 as dense", f"{same:.2f} %", same, ("on images without labels", *lowered))
    return Tile("accuracy", "not measured", None, (), fell_short=True)


def _size(report: Report) -> Tile:
    head = headline(report)
    pruned = head and engine_bytes(report, "pruned", head)
    dense = head and engine_bytes(report, "dense", head)
    if head and pruned and dense:
        details = f"dense {dense / 1e6:.1f} MB", f"{head.runtime}, {precisions(head)}"
        return Tile("engine size", f"{pruned / 1e6:.1f} MB", pruned, details)
    built = (e for e in report.engines if e.model == "pruned")
    smallest = min(built, key=lambda e: e.bytes, default=None)
    if smallest is None:
        return Tile("engine size", "not built", None, (), fell_short=True)
    return Tile(
        "engine size", f"{smallest.bytes / 1e6:.1f} MB", smallest.bytes, (f"{smallest.runtime}, {smallest.precision}",)
    )


def _work(report: Report) -> Tile:
    dense, pruned = report.dense, report.pruned
    left = 100 * pruned.macs / dense.macs
    return Tile(
        "of the MACs left",
        f"{left:.1f} %",
        left,
        (
            f"{short_count(dense.macs)} to {short_count(pruned.macs)} MACs",
            f"{short_count(dense.params)} to {short_count(pruned.params)} parameters",
        ),
    )


def _gates(report: Report) -> Tile:
    passed, total = sum(p.passed for p in report.parity), len(report.parity)
    if not total:
        return Tile("parity gates", "none ran", None, ("outputs were not compared",), fell_short=True)
    images = max(p.images for p in report.parity)
    detail = f"outputs match on {images} images" if passed == total else f"{total - passed} failed"
    return Tile("parity gates passed", f"{passed} of {total}", passed, (detail,), fell_short=passed < total)
