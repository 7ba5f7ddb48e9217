"""A pruning plan, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import pydantic
from torch import nn

from upvits.calib_data.documents import Count, Name, Natural, Number, Text, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.printable import printable
from upvits.toolchain.choices import Component
from upvits.toolchain.families import narrow
from upvits.toolchain.networks.depth import after_shortening, name_after, name_before
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.structure.groups import Widths
from upvits.toolchain.structure.macs import count_macs, count_params

FORMAT: Literal[2] = 2
_AGAIN = "Plan again, or use the version that wrote it."


@dataclass(frozen=True, slots=True)
class Size:
    """Multiply-accumulates of one image and number of parameters."""

    macs: Natural
    params: Natural


@dataclass(frozen=True, slots=True)
class Change:
    """One group before and after.

    Attributes:
        group: its name in the dense network; where q·k and v dims come apart, `blocks.3.attn.qk` and `blocks.3.attn.v`.
        before, after: units; `after` is 0 when the branch left with its block.
        heads: before and after, (0, 0) for groups that are not of an attention.
    """

    group: str
    before: int
    after: int
    heads: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What is kept, per group, and why.

    Attributes:
        keep: group name -> kept units in ascending order; groups that are not named stay whole. Whole heads are given
            as all their dims. An attention is named once (q, k and v keep the same dims) or as `.qk` and `.v`.
        num_heads: attention module -> number of heads after the cut; the kept dims are theirs in order.
        architecture: timm name of the result when it differs from the dense network's (`like`).
        asked: what was asked for, e.g. {"ratio": 0.5, "align": 8}.
        before, after: size of the dense and of the pruned network.
        dense_widths: group sizes of the dense network.
        method: scores that decided.
        model_digest: sha256 of the dense network that the plan was made for.
        blocks: lists of blocks that get shorter -> the (attention, FFN) pairs that are left. `keep` and `num_heads`
            name groups of the shortened network, `dense_widths` those of the dense one.
        planner: how the widths were chosen.

    Example:
        >>> import upvits
        >>> model = upvits.create_model("pvtv2_b0", weights="demo")
        >>> plan = upvits.plan(model, upvits.score(model, method="magnitude"), ratio=0.5)
        >>> plan.before.params, plan.after.params
        (3412844, 871868)
    """

    keep: dict[Name, tuple[Count, ...]]
    num_heads: dict[Name, Natural]
    architecture: Name | None
    asked: dict[Name, Number | Count | Text]
    before: Size
    after: Size
    dense_widths: Widths
    method: Name
    model_digest: Name
    blocks: dict[Name, tuple[tuple[Count, Count], ...]] = field(default_factory=dict)
    planner: Name = "uniform"
    format: Literal[1, 2] = field(default=FORMAT)

    @property
    def widths(self) -> Widths:
        """Group sizes of the pruned network, by its own names."""
        channels = after_shortening(self.dense_widths.channels, self.blocks)
        num_heads = {**after_shortening(self.dense_widths.num_heads, self.blocks), **self.num_heads}
        sizes = {**channels, **{name: len(units) for name, units in self.keep.items()}}
        for module in num_heads:
            parts = {part: sizes.pop(f"{module}.{part}", None) for part in ("qk", "v")}
            if parts != {"qk": None, "v": None}:
                whole = sizes.pop(module, 0)  # of the part that is not named
                qk, v = (whole if size is None else size for size in parts.values())
                sizes |= {module: qk} if qk == v else {f"{module}.qk": qk, f"{module}.v": v}
        return Widths(channels=sizes, num_heads=num_heads)

    @property
    def cut(self) -> tuple[object, ...]:
        """What is left: equal for plans that give the same network."""
        return self.keep, self.num_heads, self.blocks

    @property
    def requested(self) -> dict[str, float | int | str]:
        """`asked` without what planners derived from it."""
        derived = ("budget", "unit", "floor")
        return {name: value for name, value in self.asked.items() if name not in derived}

    @property
    def components(self) -> tuple[Component, ...]:
        """What was allowed to be cut; empty where a whole network was taken over."""
        names = str(self.asked.get("components", "")).split(",")
        return tuple(component for component in get_args(Component) if component in names)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every group of the dense network with what becomes of it."""
        after = self.widths
        result = []
        for name, size in self.dense_widths.channels.items():
            module = name if name in self.dense_widths.num_heads else name.rpartition(".")[0]
            heads = self.dense_widths.num_heads.get(module, 0)
            renamed, home = name_after(name, self.blocks), name_after(module, self.blocks)
            if renamed is None or home is None:
                result.append(Change(name, size, 0, (heads, 0)))
                continue
            both = (heads, after.num_heads.get(home, 0))
            if renamed in after.channels or home in after.channels:
                result.append(Change(name, size, after.channels.get(renamed, after.channels.get(home, 0)), both))
            else:
                parts = ((f".{part}", after.channels[f"{renamed}.{part}"]) for part in ("qk", "v"))
                result += [Change(name + part, size, left, both) for part, left in parts]
        return tuple(result)

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return _DOCUMENT.dump_json(self, indent=2).decode() + "\n"

    @staticmethod
    def load(path: Path) -> PruningPlan:
        """Read a plan.

        Raises:
            UserError: the file is missing, is no plan, or was written by a later version.
        """
        plan = read_document(path, PruningPlan, fix=_AGAIN)
        wrong = _not_of_the_network(plan)
        if wrong:
            raise UserError(
                f"{path} is not valid.", why=f"{printable(wrong, 300)} is not of its dense network.", fix=_AGAIN
            )
        return replace(plan, format=FORMAT)  # format 1 had no `blocks` and no `planner`: the defaults are what it means


_DOCUMENT = pydantic.TypeAdapter(PruningPlan)


def _not_of_the_network(plan: PruningPlan) -> str:
    """A part of a plan that does not fit the widths that it gives for the dense network; empty where all do."""
    sizes, heads = plan.dense_widths.channels, plan.dense_widths.num_heads
    try:
        for name, units in plan.keep.items():
            before = name_before(name, plan.blocks)
            size = sizes[before] if before in sizes else sizes[before.rpartition(".")[0]]
            if not units or units[-1] >= size or any(one >= other for one, other in pairwise(units)):
                return f"keep.{name}"
        for module, count in plan.num_heads.items():
            if count > heads[name_before(module, plan.blocks)]:
                return f"num_heads.{module}"
        for change in plan.changes:
            if change.after > change.before:
                return change.group
    except (ValueError, LookupError):  # no number of a block, or of none that is left; no such group
        return "a name in keep, num_heads or blocks"
    return ""


def widths_kept(keep: Mapping[str, Sequence[int]], num_heads: Mapping[str, int]) -> Widths:
    """The sizes of the groups that a plan names, for `narrow`."""
    return Widths({name: len(units) for name, units in keep.items()}, dict(num_heads))


def sizer(model: nn.Module, input_size: tuple[int, int, int] | None) -> Callable[[Widths], Size]:
    """Counts the size that a network has at other widths."""
    shape = input_size or preprocess_of(model).input_size

    def size(widths: Widths) -> Size:
        narrowed = narrow(model, widths)
        return Size(count_macs(narrowed, shape), count_params(narrowed))

    return size
