"""Which number a class has: by a class map, by the network's own names, or by the order of the names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import RootModel

from upvits.calib_data.choices import Order
from upvits.calib_data.datasets import MAX_CLASSES, DataSource
from upvits.calib_data.documents import parse_document, read_regular
from upvits.calib_data.errors import UserError
from upvits.calib_data.printable import printable

_MAP_FIX = (
    "Give text with the name of one class a line, in the order of the network's outputs, or JSON: a list of names, or "
    '{"name": number}.'
)


class _Map(RootModel[list[str] | dict[str, int] | dict[str, str]]):
    """Names by number, numbers by name, or names by number in quotes."""


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """timm's order, in which 2 comes before 10 and capitals do not matter.

    >>> natural_order(["10", "2", "b", "A"])
    ('2', '10', 'A', 'b')
    """
    return tuple(sorted(sorted(names), key=_natural_key))


def _natural_key(name: str) -> list[int | str]:
    """Signs that are digits but no numbers stay text."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def text_order(names: Iterable[str]) -> tuple[str, ...]:
    """torchvision's order, letter by letter.

    >>> text_order(["10", "2", "b", "A"])
    ('10', '2', 'A', 'b')
    """
    return tuple(sorted(names))


def read_class_map(path: Path) -> dict[str, int]:
    """Numbers by name from a class map, as timm has them: text, one name a line; or JSON.

    Raises:
        UserError: it cannot be read, is empty, or gives a name or a number twice.
    """
    content = read_regular(path, fix=_MAP_FIX)
    try:
        text = content.decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"The class map {path} is no text.", why=f"{error}.", fix=_MAP_FIX) from error
    if text.lstrip()[:1] in ("{", "["):
        pairs = _json_pairs(text, path)
    else:
        lines = [line.strip() for line in text.splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        pairs = [(name, number) for number, name in enumerate(lines)]
    names, numbers = [name for name, _ in pairs], [number for _, number in pairs]
    faults = [f"{name!r} twice" for name in _repeated(names)] + [f"the number {n} twice" for n in _repeated(numbers)]
    faults += [f"the number {number}" for number in numbers if not 0 <= number < MAX_CLASSES]
    faults += ["a class without a name"] if "" in names else []
    if faults or not pairs:
        raise UserError(
            f"The class map {path} has {_some(faults) if faults else 'no classes'}.",
            why="Every class has one name and one number, from 0 on.",
            fix=_MAP_FIX,
        )
    return dict(pairs)


def _json_pairs(text: str, path: Path) -> list[tuple[str, int]]:
    found = parse_document(text, f"The class map {path}", _Map, fix=_MAP_FIX).root
    if isinstance(found, list):
        return [(name, number) for number, name in enumerate(found)]
    pairs = []
    for key, value in found.items():
        if isinstance(value, int):
            pairs.append((key, value))
        elif key.isdecimal() and len(key) < 10:
            pairs.append((value, int(key)))
        else:
            raise UserError(f"The class map {path} has {printable(key, 60)!r} where a number is.", fix=_MAP_FIX)
    return pairs


def _repeated(values: Sequence[object]) -> list[object]:
    seen: set[object] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def with_class_map(source: DataSource, path: Path) -> DataSource:
    """The data with the numbers of a class map.

    A text map names the classes of the data, all and no others. A JSON map with numbers may leave some out: outputs of
    the network that the data have no images for.

    Raises:
        UserError: it misses classes of the data, or names others; the data have no labels.
    """
    numbers = read_class_map(path)
    if source.class_names is None:
        raise UserError(f"{source.spec} has no labels that a class map could number.", fix="Leave `class_map=` out.")
    missed = sorted(set(source.class_names) - numbers.keys())
    unknown = sorted(numbers.keys() - set(source.class_names))
    if missed or unknown:
        faults = [f"misses {_some(missed)}"] if missed else []
        faults += [f"names {_some(unknown)}, of which there are no images"] if unknown else []
        raise UserError(
            f"The class map {path} {' and '.join(faults)}.",
            why=f"It has to give a number to every class of {source.spec}, and to no other.",
            fix="Correct the names. Where the data hold some of the network's classes only, give JSON with those: "
            '{"name": number}.',
        )
    names = {number: name for name, number in numbers.items()}
    numbered = source.renumbered([names.get(number, f"class {number}") for number in range(max(names) + 1)])
    return replace(numbered, numbered_by_name=False)


def with_order(source: DataSource, order: Order) -> DataSource:
    """The data with classes numbered in this order of their names; as it is where the data number them themselves."""
    if source.class_names is None or not source.numbered_by_name:
        return source
    names = (natural_order if order == "natural" else text_order)(source.class_names)
    return replace(source.renumbered(names), numbered_by_name=False)


def with_names(source: DataSource, names: Sequence[str] | None) -> DataSource:
    """The data with the network's numbers, where all of its classes are among the network's names."""
    if source.class_names is None or names is None or not set(source.class_names) <= set(names):
        return source
    return replace(source.renumbered(names), numbered_by_name=False)


def with_outputs(source: DataSource, outputs: int) -> DataSource:
    """The data with a name for every output of a network; outputs that the class map leaves out are named by number."""
    if source.class_names is None or len(source.class_names) >= outputs:
        return source
    more = (f"class {number}" for number in range(len(source.class_names), outputs))
    return source.renumbered([*source.class_names, *more])


def is_ambiguous(source: DataSource) -> bool:
    """Whether the classes have numbers by the order of their names, and that order can be meant in two ways."""
    names = source.class_names
    return source.numbered_by_name and names is not None and natural_order(names) != text_order(names)


def _some(items: Collection[str]) -> str:
    shown = [printable(item, 60) for item in list(items)[:5]]
    return ", ".join(shown) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
