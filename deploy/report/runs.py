"""Several runs side by side: which one to deploy, and what each gains and costs.

Latencies of two runs can only be compared where they were measured on the same device, at the same batch size, and
while that device was as fast: every run measures its dense network too, which is the yardstick. Latencies of a run are
scaled by what that network took there and in the first run. Where the yardsticks lie too far apart, or the devices
differ, the comparison says so and leaves out what would be wrong: the Pareto front across runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from upvits.calib_data.documents import Count, Name, Natural, Number, Positive, Text
from upvits.calib_data.errors import UserError
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import comparisons, device_of, headline, verdict
from upvits.deploy.report.views.charts import Choice, pareto
from upvits.deploy.report.views.page import choices
from upvits.deploy.report.views.results import engine_bytes
from upvits.deploy.report.views.section import inline
from upvits.deploy.report.views.summary import shortcomings

MOST_DRIFT = 10.0
"""Percent. Where the same dense network was measured further apart, no verdict across runs is given."""

_MACHINE = ("cpu", "cores_usable", "gpus", "driver")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunChoice(_Document):
    """One model of a run in one runtime and precision; `on_front`: no other one is both faster and more accurate.

    `measured_ms` is the latency in its own run, `ms` the one on the scale of the first run that has the same dense
    network, in milliseconds a batch.
    """

    run: Name
    model: Name
    runtime: Name
    precision: Name
    batch: Natural
    ms: Positive
    measured_ms: Positive | None = None
    accuracy: Number
    on_front: bool


class RunLine(_Document):
    """One run: what it is, what came out, and what fell short.

    `ms`, `speedup` and `bytes` are those of the best choice of the run, None where nothing was measured.
    """

    run: Name
    verdict: Text
    model: Name
    weights: Name
    ratio: Number | None
    params: Natural
    macs: Natural
    dense_top1: Number | None
    top1: Number | None
    agreement: Number | None
    device: Name
    runtime: Name | None
    precision: Name | None
    batch: Natural | None
    ms: Number | None
    speedup: Number | None
    low: Number | None
    high: Number | None
    bytes: Count | None
    fell_short: list[Text]


class RunWidths(_Document):
    """A prunable dimension: before, and after in every run (None where a run has no such dimension)."""

    group: Name
    before: Natural
    after: dict[Name, Count | None]


class DenseDrift(_Document):
    """What one dense network took in several runs, in milliseconds a batch, and how far apart the runs are."""

    runtime: Name
    precision: Name
    ms: dict[Name, Positive]

    @property
    def percent(self) -> float:
        """How much slower the slowest run was than the fastest."""
        return 100 * (max(self.ms.values()) / min(self.ms.values()) - 1)


class RunComparison(_Document):
    """Runs side by side. `not_comparable` says why latencies of different runs cannot be compared, if they cannot."""

    format_version: Literal[1, 2] = 2
    runs: list[RunLine]
    not_comparable: list[Text]
    drift: list[DenseDrift] = []
    choices: list[RunChoice]
    widths: list[RunWidths]


def compare_runs(reports: Mapping[str, Report]) -> RunComparison:
    """Compare reports by run name, in the order given.

    Raises:
        UserError: fewer than two were given.
    """
    if len(reports) < 2:
        raise UserError("One run alone cannot be compared.", fix="Give two or more run directories.")
    differences = _differences(reports)
    drift = [] if differences else _drift(reports)
    worst = max(drift, key=lambda found: found.percent, default=None)
    differences += [_drifted(worst)] if worst and worst.percent > MOST_DRIFT else []
    scale = {} if differences else _scales(drift)
    document = RunComparison(
        runs=[_line(name, report) for name, report in reports.items()],
        not_comparable=differences,
        drift=drift,
        choices=[choice for name, report in reports.items() for choice in _choices(name, report, scale)],
        widths=_widths(reports),
    )
    front = [] if document.not_comparable else [choice.name for choice in pareto(drawn(document))]
    marked = [c.model_copy(update={"on_front": _name(c) in front}) for c in document.choices]
    return document.model_copy(update={"choices": marked})


def _line(name: str, report: Report) -> RunLine:
    best = headline(report)
    return RunLine(
        run=name,
        verdict=verdict(report),
        model=report.model,
        weights=report.weights,
        ratio=report.ratio,
        params=report.pruned.params,
        macs=report.pruned.macs,
        dense_top1=report.dense.top1,
        top1=report.pruned.top1,
        agreement=report.pruned.agreement,
        device=device_of(report),
        runtime=best and best.runtime,
        precision=best and best.precision,
        batch=best and best.batch,
        ms=best and best.pruned_ms,
        speedup=best and best.speedup,
        low=best and best.low,
        high=best and best.high,
        bytes=best and engine_bytes(report, "pruned", best),
        fell_short=shortcomings(report),
    )


def _differences(reports: Mapping[str, Report]) -> list[str]:
    """Why latencies or accuracies of these runs are not on one scale."""
    reasons = []
    unmeasured = [name for name, report in reports.items() if not comparisons(report)]
    if unmeasured:
        reasons.append(f"Latency was not measured in {', '.join(unmeasured)}.")
    undecided = [name for name, report in reports.items() if comparisons(report) and headline(report) is None]
    if undecided:
        reasons.append(f"Nothing was chosen to deploy in {', '.join(undecided)}.")
    machines = {name: report.environment.model_dump() for name, report in reports.items()}
    for key in _MACHINE:
        values = {name: inline(machine[key]) for name, machine in machines.items()}
        if len(set(values.values())) > 1:
            told = "; ".join(f"{name}: {value}" for name, value in values.items())
            reasons.append(f"The machines differ in {key.replace('_', ' ')} ({told}).")
    batches = {name: best.batch for name, report in reports.items() if (best := headline(report)) is not None}
    if len(set(batches.values())) > 1:
        told = "; ".join(f"{name}: {batch}" for name, batch in batches.items())
        reasons.append(f"The batch sizes differ ({told}).")
    data = {name: report.data for name, report in reports.items()}
    if len(set(data.values())) > 1:
        told = "; ".join(f"{name}: {spec}" for name, spec in data.items())
        reasons.append(f"Accuracy was measured on different data ({told}).")
    if len({report.pruned.top1 is None for report in reports.values()}) > 1:
        reasons.append("Some runs have labels and others do not.")
    return reasons


def _drift(reports: Mapping[str, Report]) -> list[DenseDrift]:
    """What every dense network took that several runs measured, in fp32 where they have it, runtime by runtime."""
    dense: dict[tuple[str, str], dict[str, dict[tuple[str, str], float]]] = {}
    for name, report in reports.items():
        best = headline(report)
        assert best is not None  # `_differences` names runs without one
        measured = {(c.runtime, c.precision): c.dense.median for c in comparisons(report) if c.batch == best.batch}
        dense.setdefault((report.model, report.weights), {})[name] = measured
    return [
        DenseDrift(runtime=runtime, precision=precision, ms={name: ms[runtime, precision] for name, ms in runs.items()})
        for runs in dense.values()
        if len(runs) > 1
        for runtime, precision in _yardsticks(list(runs.values()))
    ]


def _yardsticks(runs: Sequence[Mapping[tuple[str, str], float]]) -> list[tuple[str, str]]:
    """One precision for every runtime that all runs have, fp32 if possible."""
    common = [place for place in runs[0] if all(place in run for run in runs)]
    chosen: dict[str, str] = {}
    for runtime, precision in sorted(common, key=lambda place: place[1] != "fp32"):
        chosen.setdefault(runtime, precision)
    return list(chosen.items())


def _drifted(drift: DenseDrift) -> str:
    told = ", ".join(f"{ms:.3g} ms in {name}" for name, ms in drift.ms.items())
    return (
        f"The machine changed between the runs: the same dense network took {told} on {drift.runtime} "
        f"{drift.precision}, {drift.percent:.0f} % apart where {MOST_DRIFT:.0f} % are allowed. The speed-up of each "
        "run was measured within it and still holds; `upvits-deploy bench RUN RUN` measures all of them in one go."
    )


def _scales(drift: Sequence[DenseDrift]) -> dict[tuple[str, str], float]:
    """What latencies of a run in a runtime are multiplied with to stand on the scale of the first run."""
    return {
        (name, found.runtime): next(iter(found.ms.values())) / ms for found in drift for name, ms in found.ms.items()
    }


def _choices(name: str, report: Report, scale: Mapping[tuple[str, str], float]) -> list[RunChoice]:
    """What could be deployed of a run, at the batch size of its verdict."""
    best = headline(report)
    if best is None:
        return []
    return [
        RunChoice(
            run=name,
            model=choice.model,
            runtime=choice.series,
            precision=choice.label,
            batch=best.batch,
            ms=choice.ms * scale.get((name, choice.series), 1.0),
            measured_ms=choice.ms,
            accuracy=choice.accuracy,
            on_front=False,
        )
        for choice in choices(report, best.batch)
    ]


def _name(choice: RunChoice) -> str:
    return f"{choice.run} {choice.model} {choice.runtime} {choice.precision}"


def drawn(document: RunComparison) -> list[Choice]:
    """Choices as points of a chart, the dense network of every run among them."""
    runs = [line.run for line in document.runs]
    return [
        Choice(c.precision, _name(c), c.model, c.run, runs.index(c.run), c.ms, c.accuracy) for c in document.choices
    ]


def _widths(reports: Mapping[str, Report]) -> list[RunWidths]:
    """Widths of all runs; those of runs from different models are too unlike to stand side by side."""
    plans = {name: report.plan for name, report in reports.items()}
    if len({report.model for report in reports.values()}) > 1:
        return []
    after = {name: {w.group: w.after for w in plan.widths} if plan else {} for name, plan in plans.items()}
    before = {w.group: w.before for plan in plans.values() if plan for w in plan.widths}
    return [
        RunWidths(group=group, before=size, after={name: after[name].get(group) for name in reports})
        for group, size in before.items()
    ]
