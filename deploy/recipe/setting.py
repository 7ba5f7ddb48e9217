"""One setting in one place: its default, its limits, what it means, and how the command line calls it."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import Field

T = TypeVar("T")

GENERAL, INPUT, PLAN, TRAIN, ENGINE, BENCH, RUN = (
    "",
    "The network and its input",
    "What is cut",
    "Fine-tuning",
    "Engines",
    "Measuring",
    "Run",
)
"""Panels of the help."""

REQUIRED: Any = ...
"""The default of a setting that has to be given."""


def setting(
    default: T | str, help: str, *option: str, panel: str = GENERAL, shown: str | None = None, **limits: Any
) -> T:
    """A field of a recipe, which the command line, the JSON Schema and the documents read.

    Args:
        default: value where nothing is given, as text where the field parses text; None is filled in from the model
            and the data.
        help: what the setting means, in one sentence.
        option: names on the command line, e.g. `--ratio`, `-r`; none for a setting that stands in recipe files only.
        panel: the part of the help that the option belongs to.
        shown: the default in words, where `default` is None.
        limits: of pydantic's `Field`, e.g. `ge=1`.
    """
    about = {"option": list(option), "panel": panel, "shown": shown}
    extra: dict[str, Any] = {f"x-{name}": value for name, value in about.items() if value}
    field: T = Field(default, description=help, json_schema_extra=extra, **limits)
    return field
