"""A pruning plan, in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pydantic
from torch import nn

from calib_data.errors import UserError
from toolchain.families import narrow
from toolchain.groups import Widths
from toolchain.macs import count_macs, count_params
from toolchain.models import preprocess_of

Component = Literal["embed", "attention", "heads", "ffn"]


DEFAULT_COMPONENTS: tuple[Component, ...] = ("embed", "attention", "ffn")


@dataclass(frozen=True, slots=True)
class Size:
    """Multiply-accumulates of one image and number of parameters."""

    macs: int
    params: int


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What is kept, per group, and why.

    Attributes:
        keep: group name -> kept units in ascending order. Whole heads are given as all their dims.
        num_heads: attention group name -> number of heads after the cut; the kept dims are theirs in order.
        architecture: timm name of the result when it differs from the dense network's (`like`).
        asked: what was asked for, e.g. {"ratio": 0.5, "align": 8}.
        before, after: size of the dense and of the pruned network.
        dense_widths: group sizes of the dense network.
        method: scores that decided.
        model_digest: sha256 of the dense network that the plan was made for.
        blocks: lists of blocks that get shorter -> the (attention, FFN) pairs that are left. All groups above are those
            of the shortened network.
        planner: how the widths were chosen.
    """

    keep: dict[str, tuple[int, ...]]
    num_heads: dict[str, int]
    architecture: str | None
    asked: dict[str, float | int | str]
    before: Size
    after: Size
    dense_widths: Widths
    method: str
    model_digest: str
    blocks: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    planner: str = "uniform"
    format: int = field(default=2)

    @property
    def widths(self) -> Widths:
        """Group sizes of the pruned network."""
        return Widths(
            channels={**self.dense_widths.channels, **{name: len(units) for name, units in self.keep.items()}},
            num_heads={**self.dense_widths.num_heads, **self.num_heads},
        )

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return _DOCUMENT.dump_json(self, indent=2).decode() + "\n"

    @staticmethod
    def load(path: Path) -> PruningPlan:
        """Read a plan.

        Raises:
            UserError: the file is missing or is no plan.
        """
        try:
            return _DOCUMENT.validate_json(path.read_bytes())
        except (OSError, pydantic.ValidationError) as error:
            raise UserError(f"{path} is no readable pruning plan: {error}") from error


_DOCUMENT = pydantic.TypeAdapter(PruningPlan)


def sizer(model: nn.Module, input_size: tuple[int, int, int] | None) -> Callable[[Widths], Size]:
    shape = input_size or preprocess_of(model).input_size

    def size(widths: Widths) -> Size:
        narrowed = narrow(model, widths)
        return Size(count_macs(narrowed, shape), count_params(narrowed))

    return size
