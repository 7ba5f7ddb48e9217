"""Progress of long work: a bar on stderr, for people only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn

T = TypeVar("T")


def progress_bar(*, quiet: bool, columns: Sequence[ProgressColumn] = ()) -> Progress:
    """A bar on stderr that goes away at the end; none when quiet or when nobody watches."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)


def watched(items: Iterable[T], title: str, *, quiet: bool, total: float | None = None) -> Iterator[T]:
    """The same items, with a bar on stderr that goes away at the end; none when quiet or when nobody watches.

    >>> list(watched([1, 2], "counting", quiet=True))
    [1, 2]
    """
    with progress_bar(quiet=quiet) as progress:
        yield from progress.track(items, total=total, description=title)
