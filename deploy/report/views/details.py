"""The sections behind the answer: what was built, why it is not faster, widths, layers, checks, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upvits.deploy.graphs.names import module_of
from upvits.deploy.measure.diagnosis import TRUSTED_SUM
from upvits.deploy.measure.document import LayerTimes
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import shortfall
from upvits.deploy.report.views.section import (
    Bar,
    Cell,
    Section,
    count,
    counts,
    fine_ms,
    inline,
    megabytes,
    percent,
    seconds,
    times,
    words,
)

LAYERS_SHOWN = 20


def built(report: Report) -> Section:
    """What the runtimes made of the graphs."""
    known = [(e, e.built) for e in report.engines if e.built is not None]
    return Section(
        "built",
        "What was really built",
        ("model", "runtime", "precision", "matrix products", "planned", "fused attention", "layers", "casts",
         "reformats", "memory, MB", "read from"),
        tuple(
            (
                words(e.model),
                words(e.runtime),
                words(e.precision),
                words(counts(b.gemms)),
                words("the same" if counts(b.planned) == counts(b.gemms) else counts(b.planned)),
                Cell("not told" if b.attention_fused is None else f"{b.attention_fused} of {b.attention_blocks}",
                     b.attention_fused),
                count(b.layers),
                count(b.casts),
                count(b.reformats),
                megabytes(b.memory_bytes),
                words(b.source),
            )
            for e, b in known
        ),
        text_columns=(0, 1, 2, 3, 4, 10),
        sortable=True,
    )  # fmt: skip


def findings(report: Report) -> Section:
    """Why latency fell less than the MACs did."""
    gap = shortfall(report)
    return Section(
        "findings",
        "Why is it not faster?",
        ("cause", "what was seen", "what would change it"),
        tuple((words(f.cause), words(f.evidence), words(f.advice)) for f in report.findings),
        (gap,) if gap else (),
        text_columns=(0, 1, 2),
        terminal=(0, 2),
    )


def widths(report: Report) -> Section:
    """Every prunable dimension before and after."""
    if report.plan is None:
        return Section("widths", "Widths")
    stages = [stage_of(w.group) for w in report.plan.widths]
    widest = {
        stage: max(w.before for w in report.plan.widths if stage_of(w.group) == stage)
        for stage in dict.fromkeys(stages)
    }
    return Section(
        "widths",
        "Widths",
        ("group", "before", "after", "kept, %"),
        tuple(
            (
                words(w.group),
                count(w.before),
                count(w.after),
                Cell(f"{100 * w.after / w.before:.0f}", w.after / w.before),
            )
            for w in report.plan.widths
        ),
        remarks=(
            f"Asked for: {inline(report.plan.asked)}; chosen by the {report.plan.planner} planner.",
            f"Got: {inline(report.plan.got)}.",
            f"MACs per image: {report.dense.macs:,} before, {report.pruned.macs:,} after.",
            *(f"{name}: {_block_list(pairs)}." for name, pairs in report.plan.blocks.items()),
        ),
        bars=tuple(
            Bar(w.before / widest[stage], w.after / widest[stage])
            for w, stage in zip(report.plan.widths, stages, strict=True)
        ),
        groups=tuple(stages),
    )


def _block_list(pairs: Sequence[tuple[int, int]]) -> str:
    """Which blocks are left; a shifted one names its attention's and its FFN's block."""
    names = [f"{a}" if a == f else f"{a}+{f}" for a, f in pairs]
    return f"blocks {', '.join(names)} are left (attention+FFN where they come from two)"


def compensation(report: Report) -> Section:
    """What rotating and refitting was worth, before any training."""
    figures = report.compensation
    if figures is None:
        return Section("compensation", "Compensation")
    kept = "" if figures.accepted else " Plain deletion was no worse and was kept."
    return Section(
        "compensation",
        "Compensation",
        ("", "KL to dense, nats"),
        (
            (words("plain deletion"), Cell(f"{figures.kl_deleted:.4g}", figures.kl_deleted)),
            (words("rotated and cut"), Cell(f"{figures.kl_cut:.4g}", figures.kl_cut)),
            (words("refitted"), Cell(f"{figures.kl:.4g}", figures.kl)),
        ),
        (
            f"Mean over {figures.held_out} of {figures.images} calibration images, which the fit did not see. "
            f"{figures.refitted} of {figures.layers} layers were refitted in {figures.seconds:.0f} s.{kept}",
            *figures.warnings[:5],
        ),
    )


def target(report: Report) -> Section:
    """The latency that was asked for."""
    goal = report.target
    if goal is None:
        return Section("target", "Target")
    return Section(
        "target",
        "Target",
        ("", "dense ms", "pruned ms", "faster", "from", "to"),
        tuple(
            (
                words(name),
                fine_ms(timing.dense_ms),
                fine_ms(timing.ms),
                times(timing.speedup),
                times(timing.low),
                times(timing.high),
            )
            for name, timing in (("when the plan was chosen", goal.searched), ("finished engine", goal.measured))
            if timing is not None
        ),
        (
            f"Asked for: {goal.asked}, on {goal.runtime} {goal.precision} at batch {goal.batch}: "
            f"{'met' if goal.met else 'not met'}.",
        ),
        terminal=(0, 1, 2, 3, 4, 5),
    )


def stage_of(group: str) -> str:
    """The stage of a network that a group lies in; networks without stages are one."""
    parts = group.split(".")
    return ".".join(parts[:2]) if parts[0] == "stages" and len(parts) > 1 else "all blocks"


def layer_times(report: Report) -> list[Section]:
    """Time of every layer, the longest first, a section for each profile."""
    return [_layers(number, profile, report) for number, profile in enumerate(report.layer_times)]


def parity(report: Report) -> Section:
    """Gates that compare outputs."""
    return Section(
        "parity",
        "Parity",
        ("model", "candidate", "against", "images", "max abs", "cosine", "same top-1, %", "gate"),
        tuple(
            (
                words(p.model),
                words(p.candidate),
                words(p.reference),
                count(p.images),
                Cell(f"{p.max_abs:.1e}", p.max_abs),
                Cell(f"{p.min_cosine:.6f}", p.min_cosine),
                percent(p.top1_agreement),
                words("passed" if p.passed else "failed"),
            )
            for p in report.parity
        ),
        text_columns=(0, 1, 2, 7),
        sortable=True,
    )


def engines(report: Report) -> Section:
    """Files that were built."""
    return Section(
        "engines",
        "Engine files",
        ("model", "runtime", "precision", "target", "MB", "build s", "file"),
        tuple(
            (
                words(e.model),
                words(e.runtime),
                words(e.precision),
                words(e.target),
                megabytes(e.bytes),
                seconds(e.seconds),
                words(e.path),
            )
            for e in report.engines
        ),
        text_columns=(0, 1, 2, 3, 6),
        sortable=True,
    )


def throughput(report: Report) -> Section:
    """Several sessions at the same time."""
    return Section(
        "throughput",
        "Throughput of concurrent streams",
        ("model", "runtime", "precision", "batch", "streams", "images/s"),
        tuple(
            (
                words(t.model),
                words(t.runtime),
                words(t.precision),
                count(t.batch),
                count(t.streams),
                Cell(f"{t.images_per_s:,.0f}", t.images_per_s),
            )
            for t in report.throughput
        ),
        text_columns=(0, 1, 2),
        sortable=True,
    )


def stages(report: Report) -> Section:
    """What the run took."""
    return Section(
        "stages",
        "Stages",
        ("stage", "seconds", "peak MB", ""),
        tuple(
            (
                words(s.name),
                seconds(s.seconds),
                Cell(f"{s.peak_rss_mb:,.0f}", s.peak_rss_mb),
                words("reused" if s.skipped else ""),
            )
            for s in report.stages
        ),
        text_columns=(0, 3),
    )


def reproduce(report: Report) -> Section:
    """The commands that give this result again."""
    remark = "Everything that decides the result is in recipe.toml, which lies in the run's directory."
    remarks = (remark,) if report.reproduce else ()
    return Section("reproduce", "How to reproduce", commands=tuple(report.reproduce), remarks=remarks)


def notes(report: Report) -> Section:
    """What is missing from the report."""
    return Section("notes", "What was left out and why", remarks=tuple(report.notes))


def facts(key: str, title: str, values: Mapping[str, Any]) -> Section:
    """Names and values of a JSON object."""
    rows = tuple(
        (words(name), words(inline(value))) for name, value in values.items() if value not in (None, "", [], {})
    )
    return Section(key, title, ("", ""), rows, text_columns=(0, 1))


def _slowed(profile: LayerTimes, totals: Sequence[float], report: Report) -> list[str]:
    """What to make of a profile whose layers add up to more than a call takes."""
    said = []
    for name, model, total in zip(("dense", "pruned"), (report.dense, report.pruned), totals, strict=True):
        call = model.latency_ms.get(profile.runtime, {}).get(profile.precision, {}).get(profile.batch)
        if call is not None and total > TRUSTED_SUM * call.median:
            said.append(
                f"The profiler slows this runtime down: layers of the {name} model add up to {total:.2f} ms, a call "
                f"takes {call.median:.2f} ms; read them as shares."
            )
    return said


def _layers(number: int, profile: LayerTimes, report: Report) -> Section:
    layers = sorted(profile.layers, key=lambda layer: (layer.dense_ms or 0.0, layer.pruned_ms or 0.0), reverse=True)
    longest = max((t for layer in layers for t in (layer.dense_ms, layer.pruned_ms) if t is not None), default=0) or 1.0
    totals = [sum(t for t in column if t) for column in zip(*((o.dense_ms, o.pruned_ms) for o in layers), strict=True)]
    remarks = []
    if layers:
        remarks.append(f"All {len(layers)} layers together: {totals[0]:.2f} ms dense, {totals[1]:.2f} ms pruned.")
        remarks += _slowed(profile, totals, report)
    return Section(
        "layers",
        f"Time per layer: {profile.runtime} {profile.precision}, batch {profile.batch}",
        ("layer", "dense ms", "pruned ms", "faster", "operator"),
        tuple(
            (
                words(module_of(layer.name)),
                fine_ms(layer.dense_ms),
                fine_ms(layer.pruned_ms),
                times(round(layer.dense_ms / layer.pruned_ms, 4) if layer.dense_ms and layer.pruned_ms else None),
                words(layer.op),
            )
            for layer in layers
        ),
        tuple(remarks),
        text_columns=(0, 4),
        sortable=True,
        shown=LAYERS_SHOWN,
        part=str(number),
        bars=tuple(
            Bar(*(None if t is None else t / longest for t in (layer.dense_ms, layer.pruned_ms))) for layer in layers
        ),
    )
