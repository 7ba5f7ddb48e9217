"""Options of the command line from the fields of the recipes: every setting is said there, and once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from upvits.calib_data.errors import UserError
from upvits.deploy.choices import whole_number

Values = dict[str, Any]
"""Values of a recipe, those of its parts nested: `{"model": "pvtv2_b0", "plan": {"ratio": 0.5}}`."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of a recipe that has an option.

    Attributes:
        path: its place in the recipe, e.g. `plan.ratio`.
        field: of pydantic.
        type: its type without None.
    """

    path: str
    field: FieldInfo
    type: Any

    @property
    def parameter(self) -> str:
        """Name of the command's parameter."""
        return self.path.replace(".", "_")

    @property
    def names(self) -> list[str]:
        """Names on the command line."""
        return list(about(self.field, "option") or ())

    @property
    def choices(self) -> tuple[str, ...]:
        """Values to choose from, or parts of a list of them; empty where any text may stand."""
        parts = get_args(self.type) if get_origin(self.type) is tuple else (self.type,)
        return get_args(parts[0]) if parts and get_origin(parts[0]) is Literal else ()

    @property
    def help(self) -> str:
        """What it means, what may be chosen, and the default: in brackets, which are markup unless escaped."""
        meaning = (self.field.description or "").removesuffix(".")
        choices = f" ({', '.join(self.choices)})" if self.choices else ""
        default = about(self.field, "shown") or _text(self.field.get_default())
        return f"{meaning}{choices}." + (f" \\[default: {default}]" if default else "")

    def option(self) -> inspect.Parameter:
        """The parameter of a command, as typer reads it."""
        kind = self.type if self.type in (bool, int, float) else list[str] if get_origin(self.type) is dict else str
        info = typer.Option(
            *self.names,
            help=self.help,
            rich_help_panel=about(self.field, "panel"),
            autocompletion=self.complete if self.choices else None,
        )
        return _parameter(self.parameter, Annotated[kind | None, info], None)

    def complete(self, incomplete: str) -> list[str]:
        """Choices that go on from what was typed; of a list, the last part counts."""
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + choice for choice in self.choices if choice.startswith(last)]

    def read(self, given: Any) -> Any:
        """The value that was given, as the recipe takes it; ranges and names are the recipe's business.

        Raises:
            UserError: it is empty; it is no list of whole numbers, no size, or no `key=value`, where one is expected.
        """
        parsed = any(isinstance(step, BeforeValidator) for step in _steps(self.field))  # by the recipe
        if get_origin(self.type) is dict and not parsed:
            from upvits.detection.openmm import parse_option

            return dict(parse_option(text) for text in given)
        if get_origin(self.type) is not tuple or parsed:
            if isinstance(given, str) and not given.strip():
                raise UserError(
                    f"{self.names[0]} is empty.", fix=f"Give a value, or leave {self.names[0]} out for the default."
                )
            return given
        if self.type == tuple[int, int]:
            return sides(given, self.names[0])
        if _bare(get_args(self.type)[0]) is int:
            return whole_numbers(given, self.names[0], self.field.description or "")
        return split(given)


def about(field: FieldInfo, what: str) -> Any:
    """What `setting` in deploy/recipe/setting.py noted about a field; None where it noted nothing."""
    extra = field.json_schema_extra
    return extra.get(f"x-{what}") if isinstance(extra, dict) else None


def settings_of(document: type[BaseModel], *, within: str = "") -> dict[str, Setting]:
    """The settings of a recipe that have options, by their path; a part's are among them."""
    return {setting.path: setting for setting in _settings(document, within)}


def _settings(document: type[BaseModel], within: str) -> Iterator[Setting]:
    for name, field in document.model_fields.items():
        kind = _bare(field.annotation)
        part = get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)  # 3.10: list[int]
        if about(field, "option"):  # of a part that may be missing, the option gives the first field
            path = f"{within}{name}.{next(iter(kind.model_fields))}" if part else f"{within}{name}"
            yield Setting(path, field, str if part else kind)
        elif part:
            yield from _settings(kind, f"{within}{name}.")


def takes(**groups: Iterable[Setting]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take settings: its parameter of the same name gets those that were given, as values of a recipe.

    The options stand in the help where the parameter stands in the signature.
    """
    chosen = {name: tuple(settings) for name, settings in groups.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def called(**options: Any) -> None:
            values = {name: _given(settings, options) for name, settings in chosen.items()}
            command(**values, **options)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name in chosen:
                parameters += [setting.option() for setting in chosen[parameter.name]]
            else:
                parameters.append(_parameter(parameter.name, parameter.annotation, parameter.default))
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def _given(settings: Iterable[Setting], options: dict[str, Any]) -> Values:
    """Takes the settings out of the options and nests those that were given."""
    values: Values = {}
    for setting in settings:
        given = options.pop(setting.parameter)
        if given is not None and given != []:
            *parts, name = setting.path.split(".")
            place = values
            for part in parts:
                place = place.setdefault(part, {})
            place[name] = setting.read(given)
    return values


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _bare(annotation: Any) -> Any:
    """A type without None and without limits."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _steps(field: FieldInfo) -> list[Any]:
    """What pydantic does with a value beside its type, also where the value may be None."""
    inner = [kind for kind in get_args(field.annotation) if get_origin(kind) is Annotated]
    return [*field.metadata, *(step for kind in inner for step in get_args(kind)[1:])]


def _text(default: Any) -> str:
    """A default as it would be typed; nothing for what is off."""
    if isinstance(default, (tuple, list)):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return "on" if default else ""
    return f"{default:g}" if isinstance(default, float) else str(default) if isinstance(default, (int, str)) else ""


def split(text: str) -> list[str]:
    """Parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str, option: str, meaning: str) -> list[int]:
    """Parts between commas as whole numbers above 0.

    Raises:
        UserError: one is none.
    """
    parts = split(text)
    numbers = [number for part in parts if (number := whole_number(part))]
    if not parts or len(numbers) < len(parts):
        raise UserError(f"{option} {text!r} is not valid.", why=meaning, fix=f"Give numbers like {option} 1,8.")
    return numbers


def sides(text: str, option: str) -> tuple[int, int]:
    """Two sides in pixels, `1333x800`.

    Raises:
        UserError: it is no such text.
    """
    first, _, second = text.lower().partition("x")
    width, height = whole_number(first), whole_number(second)
    if not width or not height:
        raise UserError(f"{option} {text!r} is not valid.", fix=f"Give two sides in pixels, like {option} 1333x800.")
    return width, height
