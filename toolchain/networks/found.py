"""What was found out about a network when its weights were read, kept on the network for reports and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from upvits.toolchain.structure.timm_config import config_of, update_config


@dataclass(frozen=True, slots=True)
class Found:
    """How weights were read.

    Attributes:
        notes: sentences about choices that were made: prefixes, extra tensors, heads, pooling.
        sources: for entries of the preprocessing (`input_size`, `mean`, `std`, ...), where their values come from.
        accuracy: top-1 in percent that the checkpoint recorded, if any.
        untold: timm arguments that nothing tells, each with the values that fit the tensors alike; the first is taken.
        other_sizes: heights and widths that fit the position embedding as well as the square that it is taken for.
    """

    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    accuracy: float | None = None
    untold: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    other_sizes: tuple[tuple[int, int], ...] = ()


def found_in(model: nn.Module) -> Found:
    """What was found out about this network; nothing for one that was not read from somewhere."""
    found = config_of(model).get("upvits_found")
    return found if isinstance(found, Found) else Found()


def set_found(model: nn.Module, found: Found) -> None:
    """Keep it on the network."""
    update_config(model, upvits_found=found)


def add_sources(model: nn.Module, names: Mapping[str, str]) -> None:
    """Name where further entries of the preprocessing come from."""
    found = found_in(model)
    set_found(model, replace(found, sources={**found.sources, **names}))


def how_read(model: nn.Module) -> list[str]:
    """What a report says about how a network and its input were found: notes, and the sources of the preprocessing."""
    found = found_in(model)
    by_source: dict[str, list[str]] = {}
    for name, source in found.sources.items():
        by_source.setdefault(source, []).append("size" if name == "input_size" else name.replace("_", " "))
    parts = [f"{', '.join(names)} from {source}" for source, names in by_source.items()]
    return [*found.notes, *([f"How images are prepared: {'; '.join(parts)}."] if parts else [])]
