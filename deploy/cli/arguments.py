"""Errors of the library name arguments, as in `weights="timm"`; the command line says the same with its options,
--weights timm."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import typer

from upvits.calib_data.errors import UserError

_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)=([^`]*)`")

OTHER_NAMES = {
    "external_data": "save_external_data",
    "name": "model",
    "options": "cfg_options",
    "model_args": "model_arg",
}
"""Arguments whose options are called otherwise."""


def as_options(text: str, options: Collection[str]) -> str:
    """A message of the library in words of the command line.

    Args:
        text: names arguments in backticks, with a value or nothing behind the equals sign.
        options: that the command line has; an argument without one stays as it is.

    Example:
        >>> as_options('Leave `image_size=` out, or give `weights="timm"`.', {"--image-size", "--weights"})
        'Leave --image-size out, or give --weights timm.'
        >>> as_options('Use `compensate=False` or `components=("embed", "ffn")`.', {"--no-compensate", "--components"})
        'Use --no-compensate or --components embed,ffn.'
        >>> as_options("Give `model_args={'depth': 2, 'patch_size': 8}`.", {"--model-arg"})
        'Give --model-arg depth=2 --model-arg patch_size=8.'
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        words = OTHER_NAMES.get(name, name).replace("_", "-")
        flag = f"--no-{words}" if value == "False" else f"--{words}"
        if flag not in options:
            return match[0]
        plain = "" if value in ("True", "False") else re.sub(r"[\"'(){} ]", "", value)
        plain = plain.replace(*{"image_size": (",", "x"), "model_args": (":", "=")}.get(name, ("", "")))
        if name == "model_args":
            plain = plain.replace(",", f" {flag} ")  # one at a time
        return f"{flag} {plain}".rstrip()

    return _ARGUMENT.sub(option, text)


def options_of(app: typer.Typer) -> set[str]:
    """Every option of every command."""
    return _options(typer.main.get_command(app))


def _options(command: Any) -> set[str]:  # typer brings a click of its own, without public types
    names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return names.union(*map(_options, getattr(command, "commands", {}).values()))


def refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse values without a character, often of a variable that a script forgot: a path would be the working folder.

    Raises:
        UserError: names the option.
    """
    for before, argument in pairwise(["", *arguments]):
        bare = argument.startswith("--") and argument.endswith("=")
        if bare or not argument.strip():
            option = argument.removesuffix("=") if bare else before
            name = option if option.startswith("-") else "The argument"
            raise UserError(f"{name} is empty.", fix=f"Give a value, or leave {name} out for the default.")
