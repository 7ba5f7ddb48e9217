"""A module with exactly the names and signatures of one version of TensorRT, made from the recorded API surface.

A name that the version lacks raises AttributeError, a call with other arguments TypeError. What calls return is put in
by tests in `behaviour`, by "Class.method".
"""

import enum
import importlib.machinery
import inspect
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

SURFACE: dict[str, Any] = json.loads((Path(__file__).parent / "api_surface.json").read_text())
FLAVOURS = tuple(SURFACE["flavours"])


def names_of(flavour: str) -> set[str]:
    """Every name of a version: "Class", "Class.member", "Enum.MEMBER" and functions."""
    names = set(SURFACE["functions"])
    for kind, members in SURFACE["classes"].items():
        names |= {kind, *(f"{kind}.{name}" for name in (*members["methods"], *members["properties"]))}
    for kind, members in SURFACE["enums"].items():
        names |= {kind, *(f"{kind}.{name}" for name in members)}
    changes = SURFACE["flavours"][flavour]
    gone = changes["lacks"]
    return {name for name in names if not any(name == g or name.startswith(f"{g}.") for g in gone)} | set(
        changes["adds"]
    )


def fake_module(flavour: str, name: str = "tensorrt") -> Any:
    """The module; `calls` records (Class.method, arguments) and `behaviour` says what they return."""
    names = names_of(flavour)
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__version__ = "12.0.0" if flavour == "flag gone" else f"{flavour}.1"
    module.calls, module.behaviour = [], {}
    enums = {enum_name: _enum(enum_name, names) for enum_name in SURFACE["enums"]}
    for kind, members in SURFACE["classes"].items():
        if kind in names:
            setattr(module, kind, _class(module, kind, members, names, enums))
    for enum_name, made in enums.items():
        if "." not in enum_name:
            setattr(module, enum_name, made)
    for function, parameters in SURFACE["functions"].items():
        setattr(module, function, _call(module, function, parameters))
    return module


def _enum(name: str, names: set[str]) -> Any:
    members = sorted(known.removeprefix(f"{name}.") for known in names if known.startswith(f"{name}."))
    return enum.IntEnum(name.split(".")[-1], {member: index for index, member in enumerate(members)})


def _class(module: Any, kind: str, members: Any, names: set[str], enums: dict[str, Any]) -> type:
    space: dict[str, Any] = {"__slots__": ("__dict__",)}
    for method, parameters in members["methods"].items():
        if f"{kind}.{method}" in names:
            space[method] = _call(module, f"{kind}.{method}", ["self", *parameters])
    settable = {known.split(".")[1] for known in names if known.startswith(f"{kind}.")} - set(members["methods"])

    def set_attribute(self: Any, name: str, value: object) -> None:
        if type(self).__module__ == __name__ and name not in settable:
            raise AttributeError(f"{kind} has no property {name}")
        module.calls.append((f"{kind}.{name} =", (value,)))
        object.__setattr__(self, name, value)

    space["__setattr__"] = set_attribute
    space["__module__"] = __name__
    for enum_name, made in enums.items():
        if enum_name.startswith(f"{kind}."):
            space[enum_name.split(".")[1]] = made
    return type(kind, (), space)


def _call(module: Any, name: str, parameters: list[str]) -> Callable[..., Any]:
    signature = inspect.Signature(
        [
            inspect.Parameter(
                parameter.rstrip("="),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None if parameter.endswith("=") else inspect.Parameter.empty,
            )
            for parameter in parameters
        ]
    )

    def call(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        own = parameters[:1] == ["self"]
        module.calls.append((name, tuple(bound.args[1:] if own else bound.args)))
        act = module.behaviour.get(name)
        return act(*bound.args) if act is not None else None

    return call
