"""Writes `docs/cli.md` and `docs/recipe.md` from the commands and the recipe themselves: `make reference`.

A test holds the two files against what this makes, so that they cannot fall behind.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from upvits.deploy.cli.app import app
from upvits.deploy.recipe.detect import DetectRecipe
from upvits.deploy.recipe.document import Recipe

HERE = Path(__file__).parent
WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
SETTINGS = "Settings of a run"
MANY = 20
"""A command that takes so many of them is described by what it takes beside them."""
MADE = "<!-- Written by docs/reference.py; `make reference` writes it again. -->\n"


def pages() -> dict[str, str]:
    """The pages by file name."""
    return {"cli.md": cli_page(), "recipe.md": recipe_page()}


def cli_page() -> str:
    """Every command with its arguments and options; what several commands take alike is described once."""
    known = dict(commands())
    parts = [
        MADE,
        "# Command line\n",
        "`upvits-deploy COMMAND --help` shows the same. `python -m upvits` starts it, too.\n",
        _table(("command", "what it does"), [(f"`{name}`", _cell(command.help)) for name, command in known.items()]),
    ]
    together: dict[str, list[str]] = {}
    for name, command in known.items():
        together.setdefault(_options(command), []).append(name)
    for options, names in together.items():
        title = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        usage = "".join(f"    {_usage(name, known[name])}\n" for name in names)
        parts += [f"## {title}\n", usage, options]
    settings = [parameter for parameter in known["build"].params if _is_setting(parameter)]
    return "\n".join([*parts, f"## {SETTINGS}\n", _tables(settings)])


def commands() -> Iterator[tuple[str, Any]]:
    """Commands by name, those of groups by both names."""
    group: Any = get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {part}", leaf) for part, leaf in inner.items()) if inner else ((name, command),)


def _usage(name: str, command: Any) -> str:
    arguments = [_argument(parameter) for parameter in command.params if parameter.param_type_name == "argument"]
    return " ".join(["upvits-deploy", name, "[OPTIONS]", *arguments])


def _argument(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _options(command: Any) -> str:
    """A command's arguments and options; of settings of a run, only that it takes them, and which it does not."""
    settings = {parameter.opts[0] for parameter in command.params if _is_setting(parameter)}
    if len(settings) < MANY:
        return _tables(command.params)
    everything = [parameter.opts[0] for parameter in dict(commands())["build"].params if _is_setting(parameter)]
    without = ", ".join(f"`{name}`" for name in everything if name not in settings)
    taken = f"Takes all [{SETTINGS.lower()}](#settings-of-a-run)" + (f", without {without}" if without else "")
    return f"{taken}.\n\n{_tables(parameter for parameter in command.params if not _is_setting(parameter))}"


def _is_setting(parameter: Any) -> bool:
    """Whether an option stands for a setting of a run's recipe."""
    return parameter.param_type_name == "option" and parameter.opts[0] in _setting_names()


@functools.cache
def _setting_names() -> frozenset[str]:
    parts: list[type[BaseModel]] = [Recipe]
    parts += [part for field in Recipe.model_fields.values() if (part := _section(field)) not in (None, DetectRecipe)]
    return frozenset(name for part in parts for field in part.model_fields.values() for name in _called(field))


def _tables(parameters: Iterable[Any]) -> str:
    """Arguments and options by the panels of the help."""
    panels: dict[str, list[tuple[str, ...]]] = {}
    for parameter in parameters:
        if parameter.hidden:
            continue
        if parameter.param_type_name == "argument":
            row = (f"`{_argument(parameter)}`", _cell(parameter.help), "")
            panels.setdefault("Arguments", []).append(row)
            continue
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        panels.setdefault(parameter.rich_help_panel or "Options", []).append((names, *_meaning(parameter)))
    return "\n".join(f"**{panel}**\n\n{_table(('name', 'meaning', 'default'), rows)}" for panel, rows in panels.items())


def _meaning(parameter: Any) -> tuple[str, str]:
    """What an option means, and its default."""
    text = (parameter.help or "").replace("\\[", "[")
    written = re.search(r"\s*\[default: (.*?)\]$", text)
    if written:
        return _cell(text[: written.start()]), _cell(written[1])
    if isinstance(parameter.show_default, str):
        return _cell(text), _cell(parameter.show_default)
    nothing = parameter.default in (None, (), [], False) or callable(parameter.default)
    return _cell(text), "" if nothing else f"`{parameter.default}`"


def recipe_page() -> str:
    """Every setting of `recipe.toml`, by section."""
    plain = [(name, field) for name, field in Recipe.model_fields.items() if _section(field) is None]
    parts = [
        MADE,
        "# Recipe\n",
        "`recipe.toml` in a run's folder holds every setting of the run. `upvits-deploy build --recipe FILE` takes "
        "one; options beside it win. Settings without an option stand in recipes only. A value that is not given is "
        "filled in from the model and the data where the default is in words.\n",
        _settings(Recipe, plain),
    ]
    for name, field in Recipe.model_fields.items():
        section = _section(field)
        if section is not None:
            about = " ".join((section.__doc__ or "").split())
            parts += [f"## [{name}]\n", f"{about}\n", _settings(section, list(section.model_fields.items()))]
    return "\n".join(parts)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _settings(section: type[BaseModel], fields: list[tuple[str, FieldInfo]]) -> str:
    schemas = section.model_json_schema()["properties"]
    rows: list[tuple[str, ...]] = []
    for name, field in fields:
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        shown = extra.get("x-shown")
        if field.is_required():
            default = "required"
        elif shown is not None:
            default = str(shown)
        else:
            default = "" if field.default in (None, (), {}) else _toml(field.default)
        called = ", ".join(f"`{option}`" for option in _called(field))
        rows.append((f"`{name}`", _cell(field.description), _kind(schemas[name]), default, called))
    return _table(("setting", "meaning", "type", "default", "option"), rows)


def _called(field: FieldInfo) -> list[str]:
    """Names of a setting on the command line; of a switch, both."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    names: Any = extra.get("x-option", [])
    return [part for name in names for part in name.split("/")]


def _toml(value: object) -> str:
    """A default as `recipe.toml` writes it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _kind(schema: dict[str, Any]) -> str:
    """A type of JSON Schema in the words of TOML."""
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return f"one of {', '.join(f'`{value}`' for value in schema['enum'])}"
    if schema.get("type") == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        return f"list: {_kind(items).replace('one of', 'some of')}"
    return WORDS.get(schema.get("type", ""), "table")


def _cell(text: str | None) -> str:
    """A line of Markdown that a table can hold."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; columns that are empty in every row are left out."""
    kept = [index for index in range(len(head)) if index == 0 or any(row[index] for row in rows)]
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line[index] for index in kept)} |\n" for line in lines)


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
