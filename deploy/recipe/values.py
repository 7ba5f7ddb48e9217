"""Values that are written as text in a recipe and mean something else: parsed here, once, and written back the same."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from upvits.calib_data.errors import UserError
from upvits.deploy.choices import PRECISIONS, BatchProfile, Precision, parse_batch_profile
from upvits.deploy.speed.target import Target, parse_speedup, parse_target

_TEXT = WithJsonSchema({"type": "string"})


def parse_precisions(text: str) -> tuple[str, ...]:
    """Names of precisions, or `auto`, separated by commas.

    Raises:
        UserError: there is none, or one is unknown.

    >>> parse_precisions("fp16, int8")
    ('fp16', 'int8')
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names or (text,):
        if name not in (*PRECISIONS, "auto"):
            near = difflib.get_close_matches(name.lower(), PRECISIONS, n=1, cutoff=0.4)
            raise UserError(
                f"Unknown precision {name!r}" + (f"; did you mean {near[0]}?" if near else "."),
                fix=f"Choose from {', '.join(PRECISIONS)} or auto; several are separated by commas.",
            )
    return names


def check_gpu_target(name: str) -> str:
    """The name of a GPU's compute capability, `sm86`.

    Raises:
        UserError: it is none.
    """
    if re.fullmatch(r"sm[1-9][0-9]{1,2}", name) is None:
        raise UserError(f"Unknown target {name!r}.", fix="Targets are compute capabilities, e.g. sm86,sm120.")
    return name


Precisions = Annotated[
    tuple[Literal[Precision, "auto"], ...],
    BeforeValidator(lambda value: parse_precisions(value) if isinstance(value, str) else value),
    PlainSerializer(",".join, return_type=str),
    _TEXT,
]
"""Precisions to build, as `fp16,int8`; `auto` stands for what suits the runtime."""

Batch = Annotated[
    BatchProfile,
    BeforeValidator(lambda value: parse_batch_profile(value) if isinstance(value, str) else value),
    PlainSerializer(lambda profile: profile.text, return_type=str),
    _TEXT,
]
"""Batch sizes of engines, as `min:opt:max`."""

TargetLatency = Annotated[
    Target,
    BeforeValidator(lambda value: parse_target(value) if isinstance(value, str) else value),
    PlainSerializer(lambda target: target.spelling, return_type=str),
    _TEXT,
]
"""Milliseconds per call, as `2.0ms`."""

Speedup = Annotated[
    Target,
    BeforeValidator(lambda value: parse_speedup(value) if isinstance(value, str) else value),
    PlainSerializer(lambda target: target.spelling, return_type=str),
    _TEXT,
]
"""How many times faster than the dense network, as `2x`."""

GpuTarget = Annotated[str, AfterValidator(check_gpu_target)]
"""A compute capability, as `sm86`."""
