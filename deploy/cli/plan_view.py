"""A pruning plan as a table for a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from upvits.deploy.speed.search import LatencyRecord
from upvits.toolchain.planning import PruningPlan


def plan_table(plan: PruningPlan, timed: LatencyRecord | None = None) -> Group:
    """Groups with their widths before and after, and what was asked for and got, in milliseconds too where it was."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("group")
    for title in ("before", "after", "kept"):
        table.add_column(title, justify="right")
    for one in plan.changes:
        share = f"{100 * one.after / one.before:.0f} %"
        table.add_row(one.group, _width(one.before, one.heads[0]), _width(one.after, one.heads[1]), share)
    asked = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in plan.requested.items())  # fmt: skip
    shorter = [f"{name} keeps {_pairs(pairs)}" for name, pairs in plan.blocks.items()]
    macs, params = (getattr(plan.after, key) / getattr(plan.before, key) for key in ("macs", "params"))
    lines = [
        f"asked: {asked} (planner: {plan.planner})",
        *(["depth: " + ", ".join(shorter)] if shorter else []),
        f"got:   MACs {plan.before.macs / 1e6:,.1f} M to {plan.after.macs / 1e6:,.1f} M ({100 * macs:.1f} %), "
        f"parameters {plan.before.params / 1e6:.2f} M to {plan.after.params / 1e6:.2f} M ({100 * params:.1f} %)",
        *([_timing(timed)] if timed else []),
    ]
    return Group(table, *(Text(line) for line in lines))


def _timing(timed: LatencyRecord) -> str:
    found = timed.chosen
    return (
        f"timed: {found.dense_ms:.3g} ms to {found.measured_ms:.3g} ms ({found.speedup:.2f}x, {found.low:.2f} to "
        f"{found.high:.2f} over rounds) on {timed.runtime} {timed.precision}, batch {timed.batch}"
    )


def _pairs(pairs: tuple[tuple[int, int], ...]) -> str:
    """Blocks that stay; 10+11 is a shifted one, of the attention of block 10 and the FFN of block 11."""
    return f"{len(pairs)} blocks: " + " ".join(f"{a}" if a == ffn else f"{a}+{ffn}" for a, ffn in pairs)


def _width(size: int, heads: int) -> str:
    """Units; for attention, heads x head_dim."""
    return f"{heads} x {size // heads}" if heads else f"{size}"
