"""`--train-recipe`: settings of the fine-tuning by the name of a recipe, or from a file."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.deploy.recipe.document import DistillRecipe
from upvits.deploy.recipe.validation import validated
from upvits.deploy.store.run_dir import read_toml
from upvits.toolchain.training.recipes import RECIPES

_NOT_OF_RECIPES = ("train_recipe", "teacher", "finetuned", "workers", "checkpoint_minutes")
"""Settings of a run or of a machine."""


def train_values(recipe: str, images: int) -> dict[str, Any]:
    """Settings of the fine-tuning, by name.

    Args:
        recipe: a name, or a TOML file with settings, and with `base` the recipe that it changes.
        images: training images; the batch of a named recipe is not larger.

    Raises:
        UserError: there is no such recipe, or the file has settings that there are not.
    """
    if recipe in RECIPES:
        values = dict(RECIPES[recipe])
        return values | ({"batch_size": min(values["batch_size"], images)} if "batch_size" in values else {})
    path = user_path(Path(recipe))
    if not path.exists():
        near = get_close_matches(recipe, RECIPES, n=1)
        raise UserError(
            f"There is no recipe of training {recipe!r}, and no such file.",
            fix=f"{f'Did you mean {near[0]}? ' if near else ''}Use one of {', '.join(RECIPES)}, or name a TOML file.",
        )
    values = read_toml(path)
    base = values.pop("base", "short")
    if not isinstance(base, str) or base not in RECIPES:
        raise UserError(f"{path}: base = {base!r} is no recipe.", fix=f"Use one of {', '.join(RECIPES)}.")
    _refuse_unknown(path, values)
    given = validated(DistillRecipe, values, "upvits-deploy distill").model_dump(include=set(values))
    return train_values(base, images) | given


def _refuse_unknown(path: Path, values: dict[str, Any]) -> None:
    known = [name for name in DistillRecipe.model_fields if name not in _NOT_OF_RECIPES]
    unknown = [name for name in values if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        raise UserError(
            f"{path}: {', '.join(unknown[:4])} is no setting of a recipe of training.",
            why="A setting that nobody reads would be missed without a word.",
            fix=f"{f'Did you mean {near[0]}? ' if near else ''}There are base, {', '.join(known)}.",
        )
