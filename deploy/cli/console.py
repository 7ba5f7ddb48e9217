"""What the command line prints: plain text whatever files and options hold, and on terminals of any encoding."""

from __future__ import annotations

import codecs
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from upvits.calib_data.printable import printable, printable_json

_IN_ASCII = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{HORIZONTAL ELLIPSIS}": "...",
}
_ERRORS = "upvits.plain"


def prepare_streams() -> None:
    """Let standard output and standard error write what their encoding lacks in other words, instead of failing."""
    codecs.register_error(_ERRORS, _in_other_words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _in_other_words(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks as ASCII, or else as JSON escapes them, so that JSON stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(letter, json.dumps(letter)[1:-1]) for letter in text), error.end


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that shows control characters in texts as question marks; colours are its own business."""
    made = Console(stderr=stderr, quiet=quiet)
    made.push_render_hook(_Printable())
    return made


def print_json(text: str) -> None:
    """Print JSON or TOML; control characters in its texts are escaped."""
    print(printable_json(text))


class _Printable(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_PrintableParts(renderable) for renderable in renderables]


@dataclass(frozen=True, slots=True)
class _PrintableParts:
    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else printable(text), style, control)


def print_place(folder: Path, *, quiet: bool) -> None:
    console(quiet=quiet).print(f"Everything is in {folder}", soft_wrap=True, highlight=False, markup=False)
