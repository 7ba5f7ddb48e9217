"""Progress of long work: a bar on stderr, for people only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def watched(items: Iterable[T], title: str, *, quiet: bool, total: float | None = None) -> Iterator[T]:
    """The same items, with a bar on stderr that goes away at the end; none when quiet or when nobody watches.

    >>> list(watched([1, 2], "counting", quiet=True))
    [1, 2]
    """
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    yield from track(items, title, total=total, console=console, transient=True, disable=hidden)
