"""A pruning plan as a table for a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from toolchain.groups import Widths
from toolchain.planning import PruningPlan


def plan_table(plan: PruningPlan) -> Group:
    """Groups with their widths before and after, and what was asked for and got."""
    before, after = plan.dense_widths, plan.widths
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("group")
    for title in ("before", "after", "kept"):
        table.add_column(title, justify="right")
    for name, size in before.channels.items():
        share = f"{100 * after.channels[name] / size:.0f} %"
        table.add_row(name, _width(before, name), _width(after, name), share)
    asked = ", ".join(f"{key} {value}" for key, value in plan.asked.items())
    macs, params = (getattr(plan.after, key) / getattr(plan.before, key) for key in ("macs", "params"))
    lines = [
        f"asked: {asked}",
        f"got:   MACs {plan.before.macs / 1e6:,.1f} M to {plan.after.macs / 1e6:,.1f} M ({100 * macs:.1f} %), "
        f"parameters {plan.before.params / 1e6:.2f} M to {plan.after.params / 1e6:.2f} M ({100 * params:.1f} %)",
    ]
    return Group(table, *(Text(line) for line in lines))


def _width(widths: Widths, name: str) -> str:
    """Units; for attention, heads x head_dim."""
    size = widths.channels[name]
    heads = widths.num_heads.get(name)
    return f"{size}" if heads is None else f"{heads} x {size // heads}"
