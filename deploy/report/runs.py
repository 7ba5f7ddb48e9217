"""Several runs side by side: which one to deploy, and what each gains and costs.

Latencies of two runs can only be compared where they were measured on the same device, at the same batch size. Where
they were not, the comparison says so and leaves out what would be wrong: the Pareto front across runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Group, RenderableType
from rich.text import Text

from upvits.calib_data.errors import UserError
from upvits.deploy.report.document import REPORT, Report
from upvits.deploy.report.verdict import comparisons, device_of, headline, verdict
from upvits.deploy.report.views.charts import Choice, Scatter, pareto, scatter
from upvits.deploy.report.views.details import stage_of
from upvits.deploy.report.views.page import choices, render
from upvits.deploy.report.views.results import engine_bytes
from upvits.deploy.report.views.section import (
    Cell,
    Row,
    Section,
    count,
    megabytes,
    ms,
    percent,
    points,
    short_count,
    times,
    words,
)
from upvits.deploy.report.views.summary import shortcomings
from upvits.deploy.report.views.text import terminal_sections
from upvits.deploy.store.artifacts import MANIFEST, atomic_write
from upvits.deploy.store.run_dir import RECIPE

_MADE_BY = '<meta name="generator" content="upvits-deploy comparison">'
_MACHINE = ("cpu", "cores_usable", "gpus", "driver")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunChoice(_Document):
    """One model of a run in one runtime and precision; `on_front`: no other one is both faster and more accurate."""

    run: str
    model: str
    runtime: str
    precision: str
    batch: int
    ms: float
    accuracy: float
    on_front: bool


class RunLine(_Document):
    """One run: what it is, what came out, and what fell short.

    `ms`, `speedup` and `bytes` are those of the best choice of the run, None where nothing was measured.
    """

    run: str
    verdict: str
    model: str
    weights: str
    ratio: float | None
    params: int
    macs: int
    dense_top1: float | None
    top1: float | None
    agreement: float | None
    device: str
    runtime: str | None
    precision: str | None
    batch: int | None
    ms: float | None
    speedup: float | None
    low: float | None
    high: float | None
    bytes: int | None
    fell_short: list[str]


class RunWidths(_Document):
    """A prunable dimension: before, and after in every run (None where a run has no such dimension)."""

    group: str
    before: int
    after: dict[str, int | None]


class RunComparison(_Document):
    """Runs side by side. `not_comparable` says why latencies of different runs cannot be compared, if they cannot."""

    format_version: int = 1
    runs: list[RunLine]
    not_comparable: list[str]
    choices: list[RunChoice]
    widths: list[RunWidths]


def compare_runs(reports: Mapping[str, Report]) -> RunComparison:
    """Compare reports by run name, in the order given.

    Raises:
        UserError: fewer than two were given.
    """
    if len(reports) < 2:
        raise UserError("One run alone cannot be compared.", fix="Give two or more run directories.")
    document = RunComparison(
        runs=[_line(name, report) for name, report in reports.items()],
        not_comparable=_differences(reports),
        choices=[choice for name, report in reports.items() for choice in _choices(name, report)],
        widths=_widths(reports),
    )
    front = [] if document.not_comparable else [choice.name for choice in pareto(_drawn(document))]
    marked = [c.model_copy(update={"on_front": _name(c) in front}) for c in document.choices]
    return document.model_copy(update={"choices": marked})


def save_comparison(path: Path, document: RunComparison) -> None:
    """Write the page to `path`, and the document as JSON beside it.

    Raises:
        UserError: see `check_place`.
    """
    check_place(path)
    atomic_write(path.with_suffix(".json"), (document.model_dump_json(indent=2) + "\n").encode())
    atomic_write(path, comparison_html(document).encode())


def check_place(path: Path) -> None:
    """Refuse a place where a comparison would overwrite something else.

    Raises:
        UserError: it is no `.html` file, its folder does not exist or belongs to a run, or this file (or the one
            beside it with the suffix `.json`) exists and is no comparison.
    """
    if path.suffix != ".html":
        raise UserError(f"{path} cannot hold a comparison.", why="It is a page in HTML.", fix="End its name in .html.")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}.", fix="Make it first, or choose another --output.")
    run = next((f for f in path.absolute().resolve().parents if _is_run(f)), None)
    if run is not None:
        raise UserError(
            f"{path} lies in the run {run}.",
            why="A comparison in a run's folder could overwrite the report of that run.",
            fix="Choose an --output outside of runs.",
        )
    for file in (path, path.with_suffix(".json")):
        if (file.exists() or file.is_symlink()) and not _is_comparison(file):
            raise UserError(
                f"{file} exists and is no comparison of runs.",
                why="A comparison is a page and a JSON file beside it; writing it would overwrite something of yours.",
                fix="Choose another --output, or move this file away.",
            )


def _is_run(folder: Path) -> bool:
    """A recipe alone does not make a run: people also keep recipes in other folders."""
    return (folder / RECIPE).is_file() and any(any(folder.glob(name)) for name in (REPORT, "*/" + MANIFEST))


def _is_comparison(file: Path) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".html":
            return _MADE_BY in text
        RunComparison.model_validate_json(text)
    except (OSError, UnicodeDecodeError, ValidationError):
        return False
    return True


def comparison_sections(document: RunComparison) -> list[Section]:
    """Tables of a comparison, most important first."""
    sections = [_runs(document), _front(document), _width_table(document)]
    return [section for section in sections if section.rows or section.remarks]


def comparison_terminal(document: RunComparison) -> Group:
    """The comparison for a terminal of 80 columns."""
    parts: list[RenderableType] = []
    for line in document.runs:
        parts += [Text.assemble((f"{line.run}: ", "bold"), line.verdict)]
        parts += [Text(f"! {text}", style="yellow") for text in line.fell_short] + [Text("")]
    return Group(*parts, *terminal_sections(comparison_sections(document)))


def comparison_html(document: RunComparison) -> str:
    """The comparison as one self-contained page."""
    return render(
        "comparison.html",
        title=f"{len(document.runs)} runs compared",
        made_by=Markup(_MADE_BY),
        document=document,
        sections=comparison_sections(document),
        chart=_chart(document),
    )


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
    machines = {name: {key: report.environment.get(key) for key in _MACHINE} for name, report in reports.items()}
    for key in _MACHINE:
        values = {name: str(machine[key]) for name, machine in machines.items()}
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


def _choices(name: str, report: Report) -> list[RunChoice]:
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
            ms=choice.ms,
            accuracy=choice.accuracy,
            on_front=False,
        )
        for choice in choices(report, best.batch)
    ]


def _name(choice: RunChoice) -> str:
    return f"{choice.run} {choice.model} {choice.runtime} {choice.precision}"


def _drawn(document: RunComparison) -> list[Choice]:
    """Choices as points of a chart; a dense model that several runs measured is drawn once, for the first of them."""
    runs = [line.run for line in document.runs]
    first: dict[tuple[str, str], str] = {}
    for line in document.runs:
        first.setdefault((line.model, line.weights), line.run)
    return [
        Choice(c.precision, _name(c), c.model, c.run, runs.index(c.run), c.ms, c.accuracy)
        for c in document.choices
        if c.model == "pruned" or c.run in first.values()
    ]


def _chart(document: RunComparison) -> Scatter | None:
    """Accuracy over latency of all runs: of every run and model the choices that nothing else of it beats."""
    if document.not_comparable:
        return None
    points = _drawn(document)
    kept = [c for c in points if c in pareto(o for o in points if (o.series, o.model) == (c.series, c.model))]
    labelled = document.runs[0].top1 is not None
    title = f"Accuracy over latency, batch {document.runs[0].batch}"
    return scatter(title, kept, "top-1, %" if labelled else "agreement, %", 380)


def _runs(document: RunComparison) -> Section:
    header = ("run", "model", "ratio", "parameters", "MACs", "top-1, %", "points", "best in", "batch", "ms", "faster",
              "MB")  # fmt: skip
    return Section(
        "runs",
        "Runs",
        header,
        tuple(map(_run_row, document.runs)),
        tuple(_scale(document)),
        text_columns=(0, 1, 7),
        terminal=(0, 4, 5, 7, 9, 10, 11),
        sortable=True,
    )


def _run_row(line: RunLine) -> Row:
    change = line.top1 - line.dense_top1 if line.top1 is not None and line.dense_top1 is not None else None
    where = "nothing chosen" if line.batch is None else f"{line.runtime} {line.precision}"
    return (
        words(line.run),
        words(line.model),
        Cell("" if line.ratio is None else f"{line.ratio:g}", line.ratio),
        Cell(short_count(line.params), line.params),
        Cell(short_count(line.macs), line.macs),
        percent(line.top1),
        points(change),
        words(where),
        count(line.batch),
        ms(line.ms),
        times(line.speedup),
        megabytes(line.bytes),
    )


def _scale(document: RunComparison) -> list[str]:
    if document.not_comparable:
        return [f"Latencies of these runs are not comparable. {reason}" for reason in document.not_comparable]
    return [f"All measured on {document.runs[0].device} at batch {document.runs[0].batch}."]


def _front(document: RunComparison) -> Section:
    """The choices worth considering."""
    front: Sequence[RunChoice] = sorted((c for c in document.choices if c.on_front), key=lambda c: c.ms)
    return Section(
        "front",
        "Pareto front: nothing is both faster and more accurate",
        ("run", "model", "runtime", "precision", "ms", "accuracy, %"),
        tuple(
            (words(c.run), words(c.model), words(c.runtime), words(c.precision), ms(c.ms), percent(c.accuracy))
            for c in front
        ),
        text_columns=(0, 1, 2, 3),
        terminal=(0, 1, 2, 3, 4, 5),
        sortable=True,
    )


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


def _width_table(document: RunComparison) -> Section:
    names = [line.run for line in document.runs]
    return Section(
        "widths",
        "Widths",
        ("group", "before", *names),
        tuple((words(w.group), count(w.before), *(count(w.after[name]) for name in names)) for w in document.widths),
        groups=tuple(stage_of(w.group) for w in document.widths),
    )
