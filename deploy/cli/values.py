"""What the command line was given, as values of a recipe."""

from __future__ import annotations

from typing import Any

from upvits.calib_data.errors import UserError


def recipe_values(options: dict[str, Any]) -> dict[str, Any]:
    """Nested recipe values from the options that were given; a recipe file's values stand below them."""
    from upvits.deploy.recipe.document import read_recipe_file

    places = {
        "plan": (
            "ratio",
            "target_macs",
            "target_params",
            "like",
            "target_latency",
            "speedup",
            "depth_ratio",
            "planner",
            "rounds",
            "align",
            "components",
        ),
        "compensate": ("enabled", "refit_images"),
        "score": ("method", "num_images"),
        "distill": ("epochs", "batch_size", "lr", "feature_weight", "workers"),
        "precision": ("calib", "calib_images", "max_drop"),
        "engine": ("runtime", "precision", "batch", "targets", "workspace_mib", "require_fused_attention"),
        "export": ("opset", "uint8_input", "external_data"),
        "bench": ("batches", "seconds", "streams", "cuda_graph"),
        "detect": ("coco",),
    }
    file = options.pop("recipe")
    values: dict[str, Any] = {} if file is None else read_recipe_file(file)
    given = {name: value for name, value in options.items() if value is not None}
    for part, names in places.items():
        if not isinstance(values.get(part, {}), dict):
            raise UserError(f"The recipe has {part} = {values[part]!r}.", fix=f"Make it a table: [{part}].")
        chosen = {name: given.pop(name) for name in names if name in given}
        if chosen:
            values[part] = {**values.get(part, {}), **chosen}
    values |= given
    if "model" not in values:
        raise UserError("Which model?", fix="Give --model, e.g. --model pvtv2_b0 --ratio 0.5.")
    return values


def split(text: str | None) -> list[str] | None:
    """Parts between commas, or None where the option was not given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str | None, option: str) -> list[float] | None:
    """Parts between commas as numbers.

    Raises:
        UserError: one is none.
    """
    parts = split(text)
    try:
        return None if parts is None else [float(part) for part in parts]
    except ValueError as error:
        raise UserError(f"{text!r} are no numbers.", fix=f"Give them like {option} 0.3,0.5.") from error


def whole_numbers(text: str | None, what: str, option: str) -> list[int] | None:
    """Parts between commas as whole numbers above 0.

    Raises:
        UserError: one is none.
    """
    parts = split(text)
    if parts is None:
        return None
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{what} {text!r} are not valid.", fix=f"Give them like {option} 1,8.")
    return [int(part) for part in parts]


def input_shape_of(text: str) -> tuple[str, tuple[int, ...]]:
    """Name and sizes of `NAME=1x3x224x224`.

    Raises:
        UserError: it is no such text.
    """
    name, equals, sizes = text.partition("=")
    parts = sizes.split("x")
    if not equals or not name or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"Input shape {text!r} is not valid.", fix="Give it like images=1x3x224x224.")
    return name, tuple(int(part) for part in parts)
