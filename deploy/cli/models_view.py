"""The architectures that can be pruned as a table for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table

from upvits.toolchain.networks.catalogue import Architecture


def models_table(architectures: Iterable[Architecture]) -> Table:
    """A row each; of PVTv2, width and depth are those of its stages."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for title in ("embed_dim", "depth"):
        table.add_column(title, justify="right", no_wrap=True)
    for architecture in architectures:
        sizes = (_text(architecture.embed_dim), _text(architecture.depth))
        table.add_row(architecture.name, architecture.family, *sizes)
    return table


def _text(size: int | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int) else " ".join(map(str, size))
