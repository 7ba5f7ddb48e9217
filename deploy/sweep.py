"""The main job for several cuts of one network: accuracy over latency, and which of them nothing else beats."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Group

from upvits.calib_data.documents import Count, Name, Natural, Number, Positive, Text, read_document
from upvits.calib_data.errors import StoppedError, TargetError, UserError
from upvits.calib_data.paths import copy_regular
from upvits.deploy.pipeline import run_job
from upvits.deploy.recipe.document import CUTS, IDENTITY, Recipe, make_recipe
from upvits.deploy.recipe.request import resolve
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import Comparison, comparisons, device_of, verdict
from upvits.deploy.report.views.charts import Choice, Scatter, pareto, scatter
from upvits.deploy.report.views.page import accuracy_name, render
from upvits.deploy.report.views.section import Cell, Section, ms, percent, short_count, times, words
from upvits.deploy.report.views.text import terminal_sections
from upvits.deploy.store.artifacts import MANIFEST, atomic_write, open_artifact
from upvits.deploy.store.disk import disk_errors
from upvits.deploy.store.run_dir import RECIPE, open_run

_LOGGER = logging.getLogger(__name__)

SWEEP = "sweep.json"
PAGE = "sweep.html"
_SHARED = ("0-dense", "1-score")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SweepRun(_Document):
    """One run of a sweep, with the exit code that it would have had alone; `failed` says why there is none."""

    name: Name
    verdict: Text = ""
    params: Natural | None = None
    macs: Natural | None = None
    failed: Text | None = None
    exit_code: Count = 0


class SweepPoint(_Document):
    """A network in one runtime and precision; `on_front`: none on this runtime is both faster and more accurate.

    `ms` is the dense network's latency (median over the runs) over `speedup`, which was measured in turns with it:
    latencies of runs at different times would compare the machine's other work.
    """

    run: Name
    model: Literal["dense", "pruned"]
    runtime: Name
    precision: Name
    ms: Positive
    speedup: Positive
    accuracy: Number
    macs: Natural
    on_front: bool = False


class SweepReport(_Document):
    """All runs of a sweep. Latency at one batch size, in milliseconds per call; accuracy in percent."""

    format_version: Literal[1] = 1
    model: Name
    data: Name
    device: Name
    batch: Natural | None
    accuracy: Name
    dense_macs: Natural
    runs: list[SweepRun]
    points: list[SweepPoint]


def sweep(
    base: Recipe | Mapping[str, Any], cuts: Sequence[Mapping[str, Any]], out: Path, *, quiet: bool = True
) -> SweepReport:
    """Run the main job once for every cut, each in a folder of its own below `out`, and compare what came out.

    Runs share the scores. What is whole from an earlier call is kept; a run that fails is named, and the others go on.

    Args:
        base: a recipe or its values; the cut in it is replaced.
        cuts: values of the recipe's plan, e.g. `{"ratio": 0.5}` or `{"speedup": "2x"}`.
        out: folder for the runs, `sweep.json` and `sweep.html`.
        quiet: no progress bars.

    Raises:
        UserError: the cuts or the folder are not usable. When every run fails: the error of the first.
    """
    recipes = _recipes(base, cuts)
    _check_place(out, list(recipes))
    reports: dict[str, Report] = {}
    errors: dict[str, UserError] = {}
    for number, (name, recipe) in enumerate(recipes.items()):
        _LOGGER.info("%d of %d: %s", number + 1, len(recipes), name)
        try:
            reports[name] = _run(recipe, out / name, [out / other for other in recipes], quiet=quiet)
        except StoppedError:  # no failure of this run
            raise
        except UserError as error:
            errors[name] = error
            _LOGGER.error("%s", f"{name}: {error.what} {error.fix}".strip())
    if not reports:
        raise next(iter(errors.values()))
    report = compare_cuts(reports, errors)
    report = report.model_copy(update={"runs": sorted(report.runs, key=lambda run: list(recipes).index(run.name))})
    with disk_errors(out, "sweep"):
        atomic_write(out / SWEEP, (report.model_dump_json(indent=2) + "\n").encode())
        atomic_write(out / PAGE, sweep_html(report).encode())
    return report


def compare_cuts(reports: Mapping[str, Report], errors: Mapping[str, UserError]) -> SweepReport:
    """The document of a sweep from the reports of its runs, of which there is one at least."""
    first = next(iter(reports.values()))
    batch = max((comparison.batch for report in reports.values() for comparison in comparisons(report)), default=None)
    points = _points(reports, batch)
    front = {id(point) for group in _by_runtime(points).values() for point in _front(group)}
    runs = [
        SweepRun(
            name=name,
            verdict=verdict(report),
            params=report.pruned.params,
            macs=report.pruned.macs,
            exit_code=TargetError.exit_code if report.target is not None and not report.target.met else 0,
        )
        for name, report in reports.items()
    ]
    runs += [
        SweepRun(
            name=name, failed=" ".join(filter(None, (error.what, error.why, error.fix))), exit_code=error.exit_code
        )
        for name, error in errors.items()
    ]
    return SweepReport(
        model=first.model,
        data=first.data,
        device=device_of(first),
        batch=batch,
        accuracy=accuracy_name(first),
        dense_macs=first.dense.macs,
        runs=runs,
        points=[point.model_copy(update={"on_front": id(point) in front}) for point in points],
    )


def sweep_terminal(report: SweepReport) -> Group:
    """The sweep for a terminal of 80 columns; Pareto points are marked."""
    return Group(*terminal_sections(sweep_sections(report)))


def sweep_html(report: SweepReport) -> str:
    """The sweep as one self-contained page."""
    charts = {runtime: _chart(report, runtime, points) for runtime, points in _by_runtime(report.points).items()}
    return render(
        "sweep.html", title=f"{report.model}: {len(report.runs)} cuts", sweep=report, sections=sweep_sections(report),
        charts=charts,
    )  # fmt: skip


def sweep_sections(report: SweepReport) -> list[Section]:
    """A table per runtime, and one of the runs that failed."""
    made = [_table(report, runtime, points) for runtime, points in _by_runtime(report.points).items()]
    failed = [run for run in report.runs if run.failed is not None]
    if failed:
        rows = tuple((words(run.name), Cell(str(run.exit_code)), words(run.failed or "")) for run in failed)
        made.append(
            Section("failed", "Failed", ("run", "exit code", "why"), rows, text_columns=(0, 2), terminal=(0, 1, 2))
        )
    return made


def _recipes(base: Recipe | Mapping[str, Any], cuts: Sequence[Mapping[str, Any]]) -> dict[str, Recipe]:
    """A recipe for every cut by the name of its run."""
    values = base.model_dump(exclude_unset=True) if isinstance(base, Recipe) else dict(base)
    try:
        plan = dict(values.get("plan", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"The recipe has plan = {values['plan']!r}.", fix="Make it a table: [plan].") from error
    kept = {name: value for name, value in plan.items() if name not in CUTS}
    recipes: dict[str, Recipe] = {}
    for index, cut in enumerate(cuts):
        name = ",".join(f"{key}-{value}" for key, value in cut.items()).replace("/", "_").replace(" ", "")
        if name in recipes or not cut:
            raise UserError(f"The cut {name or '(none)'} was given twice or is empty.", fix="Give different ones.")
        twin = next((other for other in cuts[:index] if _nearly_equal(cut, other)), None)
        if twin is not None:
            raise UserError(
                f"The cuts {twin} and {cut} are nearly the same.",
                why="Shares closer than 0.001 cut the same network, and each run takes its full time.",
                fix="Give different ones.",
            )
        recipes[name] = make_recipe({**values, "plan": {**kept, **cut}})
    if not recipes:
        raise UserError("A sweep of no cuts.", fix="Give some, e.g. --ratios 0.25,0.5,0.75.")
    return recipes


def _nearly_equal(cut: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both ask for the same share of the same thing."""
    return cut.keys() == other.keys() and all(
        isinstance(value, float) and isinstance(other[key], float) and abs(value - other[key]) < 0.001
        for key, value in cut.items()
    )


def _check_place(out: Path, names: Sequence[str]) -> None:
    """Refuse a folder that is a run, holds other things, or whose results are not a sweep's."""
    if out.exists() and not out.is_dir():
        raise UserError(f"the output {out} is a file.", fix="Choose a folder with --output.")
    if (out / RECIPE).exists():
        raise UserError(f"{out} is a run.", why="A sweep holds runs.", fix="Choose another --output.")
    page, document = out / PAGE, out / SWEEP
    try:
        if document.exists():
            read_document(document, SweepReport, fix="")
        foreign = page if page.exists() and not document.exists() else None
    except UserError:
        foreign = document
    if foreign is not None:
        raise UserError(
            f"{foreign} is not of a sweep.",
            why="Writing the results would overwrite something of yours.",
            fix="Choose another --output, or move this file away.",
        )
    ours = document.exists() or any((out / name).exists() for name in names) or any(out.glob(f"*/{RECIPE}"))
    if out.is_dir() and not ours and any(out.iterdir()):
        raise UserError(
            f"the output folder {out} is not empty and is not a sweep.",
            why=f"It holds neither {SWEEP} nor runs; results among your files would be hard to tell apart from them.",
            fix="Choose an empty or new folder with --output.",
        )


def _run(recipe: Recipe, folder: Path, others: Sequence[Path], *, quiet: bool) -> Report:
    job = resolve(recipe, folder, quiet=quiet)
    with open_run(job.folder, job.recipe.model_dump(), IDENTITY):
        _share_scores(job.folder, others)
    report = run_job(job, "report")
    assert report is not None
    return report


def _share_scores(folder: Path, others: Sequence[Path]) -> None:
    """Take over what other runs found of the dense network; what does not fit is measured again."""
    for name in _SHARED:
        found = (open_artifact(other / name) for other in others if other.absolute() != folder)
        shared = next((artifact for artifact in found if artifact is not None), None)
        if shared is None or (folder / name).exists():
            continue
        draft = folder / f".{name}.shared"
        if draft.is_symlink():  # what it leads to is not ours
            draft.unlink()
        shutil.rmtree(draft, ignore_errors=True)
        for file in (*shared.manifest.files, MANIFEST):
            copy_regular(shared.folder / file, draft / file)
        draft.rename(folder / name)


def _points(reports: Mapping[str, Report], batch: int | None) -> list[SweepPoint]:
    """Every runtime and precision of every run that was timed and judged; the dense network once."""
    labelled = all(figures.top1 is not None for report in reports.values() for figures in report.accuracy)
    timed: dict[tuple[str, str], list[tuple[str, Comparison]]] = {}
    for name, report in reports.items():
        for comparison in comparisons(report):
            if comparison.batch == batch:
                timed.setdefault((comparison.runtime, comparison.precision), []).append((name, comparison))
    made = []
    for (runtime, precision), runs in timed.items():
        dense_ms = median(comparison.dense.median for _, comparison in runs)
        first = reports[runs[0][0]]
        judged = [("dense", "dense", first, first.dense.macs, 1.0)]
        judged += [(name, "pruned", reports[name], reports[name].pruned.macs, c.speedup) for name, c in runs]
        for name, model, report, macs, speedup in judged:
            accuracy = _accuracy(report, model, runtime, precision, labelled=labelled)
            if accuracy is not None:
                values = {"run": name, "model": model, "runtime": runtime, "precision": precision, "macs": macs}
                values |= {"ms": dense_ms / speedup, "speedup": speedup, "accuracy": accuracy}
                made.append(SweepPoint.model_validate(values))
    return made


def _accuracy(report: Report, model: str, runtime: str, precision: str, *, labelled: bool) -> float | None:
    for figures in report.accuracy:
        if (figures.model, figures.runtime, figures.precision) == (model, runtime, precision):
            return figures.top1 if labelled else figures.agreement
    return None


def _by_runtime(points: Sequence[SweepPoint]) -> dict[str, list[SweepPoint]]:
    names = dict.fromkeys(point.runtime for point in points)
    return {name: [point for point in points if point.runtime == name] for name in names}


def _choices(points: Sequence[SweepPoint]) -> list[Choice]:
    precisions = list(dict.fromkeys(point.precision for point in points))
    return [
        Choice(
            label=point.run,
            name=f"{point.run} {point.precision}",
            model=point.model,
            series=point.precision,
            mark=precisions.index(point.precision),
            ms=point.ms,
            accuracy=point.accuracy,
        )
        for point in points
    ]


def _front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    choices = _choices(points)
    best = pareto(choices)
    return [point for point, choice in zip(points, choices, strict=True) if choice in best]


def _chart(report: SweepReport, runtime: str, points: Sequence[SweepPoint]) -> Scatter | None:
    return scatter(f"Accuracy over latency, {runtime}, batch {report.batch}", _choices(points), report.accuracy, 360)


def _table(report: SweepReport, runtime: str, points: Sequence[SweepPoint]) -> Section:
    rows = tuple(
        (
            words(point.run),
            words(point.precision),
            ms(point.ms),
            times(point.speedup),
            percent(point.accuracy),
            Cell(short_count(point.macs), point.macs),
            Cell(f"{100 * point.macs / report.dense_macs:.0f}", point.macs / report.dense_macs),
            words("*" if point.on_front else ""),
        )
        for point in sorted(points, key=lambda point: point.ms)
    )
    return Section(
        "runtime",
        f"{runtime}, batch {report.batch}, {report.device}",
        ("run", "precision", "ms", "faster", report.accuracy, "MACs", "MACs, %", "Pareto"),
        rows,
        ("*: nothing here is both faster and more accurate.",),
        text_columns=(0, 1, 7),
        terminal=(0, 1, 2, 3, 4, 6, 7),
        sortable=True,
        part=runtime,
    )
