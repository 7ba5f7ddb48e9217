"""Predictions as people read them: tables for a terminal of 80 columns, and a page with the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upvits.calib_data.printable import printable
from upvits.deploy.predict.predictions import PicturePredictions, Predictions
from upvits.deploy.report.views.page import render
from upvits.deploy.report.views.place import check_page_place
from upvits.deploy.store.artifacts import atomic_write

_MADE_BY = '<meta name="generator" content="upvits-deploy predictions">'
_ABOUT_TIME = (
    "ms: median of 3 calls with one picture, without its preparation. `upvits-deploy bench` measures with care."
)


def predictions_terminal(predictions: Predictions) -> Group:
    """A table for each picture, and what they come to."""
    parts: list[RenderableType] = []
    for picture in predictions.pictures:
        parts += [_table(picture), ""]
    return Group(*parts, *(Text(line) for line in _summary(predictions)))


def _table(picture: PicturePredictions) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left", expand=True)
    table.title = Text(picture.path + ("" if picture.agree else "  (they differ)"), style="bold", overflow="fold")
    for name, prediction in picture.predictions.items():
        table.add_column(Text(f"{name}, {prediction.ms:.2f} ms"), no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column(Text("%"), justify="right", no_wrap=True)
    for rank in range(min(len(prediction.top) for prediction in picture.predictions.values())):
        guesses = [prediction.top[rank] for prediction in picture.predictions.values()]
        pairs = [(Text(_plain(guess.label)), Text(f"{guess.percent:.1f}")) for guess in guesses]
        table.add_row(*(cell for pair in pairs for cell in pair))
    return table


def _plain(label: str) -> str:
    """The name of a class on one line."""
    return printable(" ".join(label.split()), 200)


def _summary(predictions: Predictions) -> Iterator[str]:
    count = len(predictions.pictures)
    what = f"{count} picture" + ("s" if count != 1 else "")
    if predictions.agreement is not None:
        same = sum(picture.agree for picture in predictions.pictures)
        what += f"; dense and pruned have the same first class on {same} of {count}"
    yield f"{what}."
    yield (
        "; ".join(
            f"{name}: {predictions.median_ms[name]:.2f} ms in {runs_in}"
            for name, runs_in in predictions.networks.items()
        )
        + "."
    )
    yield _ABOUT_TIME


def save_page(path: Path, predictions: Predictions) -> None:
    """Write the page; it needs no other file.

    Raises:
        UserError: see `check_place`.
    """
    check_place(path)
    atomic_write(path, predictions_html(predictions).encode())


def predictions_html(predictions: Predictions) -> str:
    """The pictures with the classes that every network sees in them, as one self-contained page."""
    return render(
        "predictions.html",
        title=f"{len(predictions.pictures)} pictures as networks see them",
        made_by=Markup(_MADE_BY),
        predictions=predictions,
        plain=_plain,
        summary=list(_summary(predictions)),
    )


def check_place(path: Path) -> None:
    """Refuse a place where the page would overwrite something else; raises like `check_page_place`."""
    check_page_place(path, _MADE_BY, "page of predictions")
