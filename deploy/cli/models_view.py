"""The architectures that can be pruned as a table for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from upvits.toolchain.networks.catalogue import Architecture

_CUT = (
    "Of each can be cut: embed (the residual stream), attention (dims of heads) or heads or qk_v (dims of heads, q·k "
    "and v apart), ffn, depth (blocks). params: with timm's classes and image size; ? where this timm is newer than "
    "the table."
)


def models_table(architectures: Iterable[Architecture]) -> Group:
    """A row each; of PVTv2, width and depth are those of its stages."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("name", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for title in ("params", "embed_dim", "depth"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in architectures:
        table.add_row(one.name, one.family, _millions(one.parameters), _text(one.embed_dim), _text(one.depth))
    return Group(table, "", Text(_CUT))


def _millions(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.1f} M" if count < 99.95e6 else f"{count / 1e6:.0f} M"


def _text(size: int | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int) else " ".join(map(str, size))
