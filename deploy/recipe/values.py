"""Values that are written as text in a recipe and mean something else: parsed here, once, and written back the same."""

from __future__ import annotations

import ast
import difflib
import re
from typing import Annotated, Any, Literal

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


def parse_image_size(given: object) -> tuple[int, int]:
    """Height and width in pixels, from `64`, `32x128` (height first) or two numbers.

    Raises:
        ValueError: it is no such size, or a side is not from 16 to 4096.

    >>> parse_image_size("64"), parse_image_size("32x128")
    ((64, 64), (32, 128))
    """
    parts = list(given) if isinstance(given, (list, tuple)) else str(given).lower().split("x")
    sides = [int(str(part)) for part in parts if re.fullmatch(r" *[0-9]{1,5} *", str(part))]
    if len(sides) != len(parts) or len(sides) not in (1, 2) or not all(16 <= side <= 4096 for side in sides):
        raise ValueError("a side in pixels from 16 to 4096, or height x width, like 64 or 32x128, is expected")
    return sides[0], sides[-1]


def image_size_text(size: tuple[int, int]) -> str:
    """The size as it is written: `64`, or `32x128`."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def parse_model_args(given: object) -> object:
    """timm arguments from `key=value` texts; numbers, booleans and lists `[1,2]` are what they say.

    Raises:
        UserError: one is no pair.

    >>> parse_model_args(["global_pool=avg", "depth=2"])
    {'global_pool': 'avg', 'depth': 2}
    """
    if not isinstance(given, (list, tuple)):
        return given
    result: dict[str, Any] = {}
    for text in given:
        key, equals, value = str(text).partition("=")
        if not key or not equals:
            raise UserError(f"--model-arg {text!r} is not valid.", fix="Give key=value, like global_pool=avg.")
        try:
            result[key] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            result[key] = value
    return result


ImageSize = Annotated[
    tuple[int, int], BeforeValidator(parse_image_size), PlainSerializer(image_size_text, return_type=str), _TEXT
]
"""Height and width in pixels, as `64` or `32x128`."""

ModelArgs = Annotated[dict[str, Any], BeforeValidator(parse_model_args)]
"""Arguments of timm's architecture."""

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
