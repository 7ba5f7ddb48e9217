"""A comparison of runs as people read it: tables in the terminal, and a page with a JSON file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.text import Text

from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import UserError
from upvits.deploy.report.document import REPORT
from upvits.deploy.report.runs import RunChoice, RunComparison, RunLine, drawn
from upvits.deploy.report.views.charts import Scatter, pareto, scatter
from upvits.deploy.report.views.details import stage_of
from upvits.deploy.report.views.page import render
from upvits.deploy.report.views.place import check_page_place, not_ours
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
from upvits.deploy.report.views.text import terminal_sections
from upvits.deploy.store.artifacts import MANIFEST, atomic_write
from upvits.deploy.store.run_dir import RECIPE

_MADE_BY = '<meta name="generator" content="upvits-deploy comparison">'
_WHAT = "comparison of runs"


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
        UserError: it lies in a run; see `check_page_place`; or the file beside it with the suffix `.json` exists and is
            no comparison.
    """
    run = next((f for f in path.absolute().resolve().parents if _is_run(f)), None)
    if run is not None:
        raise UserError(
            f"{path} lies in the run {run}.",
            why="A comparison in a run's folder could overwrite the report of that run.",
            fix="Choose an --output outside of runs.",
        )
    check_page_place(path, _MADE_BY, _WHAT)
    document = path.with_suffix(".json")
    if document.exists() or document.is_symlink():
        try:
            read_document(document, RunComparison, fix="")
        except UserError:
            raise not_ours(document, _WHAT) from None


def _is_run(folder: Path) -> bool:
    """A recipe alone does not make a run: people also keep recipes in other folders."""
    return (folder / RECIPE).is_file() and any(any(folder.glob(name)) for name in (REPORT, "*/" + MANIFEST))


def comparison_sections(document: RunComparison) -> list[Section]:
    """Tables of a comparison, most important first."""
    sections = [_runs(document), _front(document), _drift(document), _width_table(document)]
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


def _chart(document: RunComparison) -> Scatter | None:
    """Accuracy over latency of all runs: of every run and model the choices that nothing else of it beats."""
    if document.not_comparable:
        return None
    points = drawn(document)
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
    remarks = [f"All measured on {document.runs[0].device} at batch {document.runs[0].batch}."]
    if document.drift:
        most = max(found.percent for found in document.drift)
        remarks.append(
            f"The same dense network took up to {most:.1f} % longer in one run than in another. Between runs, "
            "latencies are compared on the scale of the first one."
        )
    if len({(line.model, line.weights) for line in document.runs}) > 1:
        remarks.append(
            "The runs began with different networks: between those, a change of the machine would not show here."
        )
    return remarks


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


def _drift(document: RunComparison) -> Section:
    """The yardstick: what the same dense network took in every run."""
    names = [line.run for line in document.runs]
    return Section(
        "drift",
        "The same dense network in every run, ms",
        ("runtime", "precision", *names, "apart, %"),
        tuple(
            (words(d.runtime), words(d.precision), *(ms(d.ms.get(n)) for n in names), percent(d.percent))
            for d in document.drift
        ),
        text_columns=(0, 1),
    )


def _width_table(document: RunComparison) -> Section:
    names = [line.run for line in document.runs]
    return Section(
        "widths",
        "Widths",
        ("group", "before", *names),
        tuple((words(w.group), count(w.before), *(count(w.after[name]) for name in names)) for w in document.widths),
        groups=tuple(stage_of(w.group) for w in document.widths),
    )
