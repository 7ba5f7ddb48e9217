"""Packages whose public names are imported when they are first used (PEP 562): torch and timm take seconds to import,
and much of the tool, such as `--help`, needs neither."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its name, `__name__` there.
        names: module below the package -> public names that it defines.

    Example:
        >>> get, listed = lazy_names("upvits.calib_data", {"drawing": ("CLASS_NAMES",)})
        >>> len(get("CLASS_NAMES")), listed()
        (12, ['CLASS_NAMES'])
    """
    home = {name: module for module, defined in names.items() for name in defined}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)  # the next look needs no search
        return value

    return get, lambda: sorted(home)
