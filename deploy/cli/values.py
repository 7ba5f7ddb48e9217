"""What the command line was given, as values of a recipe and lists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from upvits.calib_data.errors import UserError
from upvits.deploy.choices import whole_number
from upvits.deploy.cli.settings import Values, split

if TYPE_CHECKING:
    from upvits.deploy.recipe.request import Job


def recipe_values(given: Values, file: Path | None) -> Values:
    """Values of a recipe: those that were given, and below them those of a recipe file.

    Raises:
        UserError: the file is no recipe, or no model is named.
    """
    from upvits.deploy.recipe.document import read_recipe_file

    values: Values = {} if file is None else read_recipe_file(file)
    for name, value in given.items():
        if not isinstance(value, dict):
            values[name] = value
        elif isinstance(values.get(name, {}), dict):
            values[name] = {**values.get(name, {}), **value}
        else:
            raise UserError(f"The recipe has {name} = {values[name]!r}.", fix=f"Make it a table: [{name}].")
    if "model" not in values:
        raise UserError("Which model?", fix="Give --model, e.g. --model pvtv2_b0 --ratio 0.5.")
    return values


def asked_job(given: Values, file: Path | None, output: Path | None = None, *, quiet: bool) -> Job:
    """The job that a command was given, checked; nothing is written.

    Raises:
        UserError: as `recipe_values` and `resolve` raise it.
    """
    from upvits.deploy.recipe.document import make_recipe
    from upvits.deploy.recipe.request import resolve  # torch, which --help does without

    return resolve(make_recipe(recipe_values(given, file)), output, quiet=quiet)


def numbers(text: str | None, option: str) -> list[float]:
    """Parts between commas as numbers; none where the option was not given.

    Raises:
        UserError: one is none.
    """
    try:
        return [float(part) for part in split(text or "")]
    except ValueError as error:
        raise UserError(f"{text!r} are no numbers.", fix=f"Give them like {option} 0.3,0.5.") from error


def input_shape_of(text: str) -> tuple[str, tuple[int, ...]]:
    """Name and sizes of `NAME=1x3x224x224`.

    Raises:
        UserError: it is no such text.
    """
    name, equals, sizes = text.partition("=")
    parts = sizes.split("x")
    shape = [size for part in parts if (size := whole_number(part))]
    if not equals or not name or len(shape) < len(parts):
        raise UserError(f"Input shape {text!r} is not valid.", fix="Give it like images=1x3x224x224.")
    return name, tuple(shape)
