"""A module with exactly the names and signatures of one version of TensorRT, or of TensorRT-RTX, and nothing behind it.

They are read from NVIDIA's own bindings (`bindings.py`). A name that the version lacks raises AttributeError, a call
with other arguments TypeError. What calls return is put in by tests in `behaviour`, by "Class.method".
"""

import copy
import enum
import importlib.machinery
import inspect
import keyword
import types
from collections.abc import Callable
from typing import Any

from tests.deploy.runtimes.bindings import RTX, VERSIONS, surface

FUTURE = "flag gone"
"""A TensorRT of tomorrow that lacks what only makes sense in old ones, and what is probed for."""
FLAVOURS = (*VERSIONS, RTX, FUTURE)
_GONE = (
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "BuilderFlag.TF32", "ParserError.node_operator",
    "ICudaEngine.device_memory_size_v2", "IProfiler",
)  # fmt: skip


def surface_of(flavour: str) -> dict[str, Any]:
    """The surface of a flavour."""
    if flavour != FUTURE:
        return surface(flavour)
    made = copy.deepcopy(surface(VERSIONS[-1]))
    made["version"] = "12.0.0"
    for name in _GONE:
        kind, _, member = name.partition(".")
        if not member:
            del made["classes"][kind]
        elif kind in made["enums"]:
            del made["enums"][kind][member]
        else:
            made["classes"][kind]["methods"].pop(member, None)
            made["classes"][kind]["properties"] = [p for p in made["classes"][kind]["properties"] if p != member]
    return made


def names_of(flavour: str) -> set[str]:
    """Every name of a version: "Class", "Class.member", "Enum.MEMBER" and functions."""
    found = surface_of(flavour)
    names = set(found["functions"])
    for kind, members in found["classes"].items():
        names |= {kind, *(f"{kind}.{name}" for name in (*members["methods"], *members["properties"]))}
    for kind, members in found["enums"].items():
        names |= {kind, *(f"{kind}.{name}" for name in members)}
    return names


def fake_module(flavour: str, name: str = "tensorrt") -> Any:
    """The module; `calls` records (Class.method, arguments) and `behaviour` says what they return."""
    found = surface_of(flavour)
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__version__ = found["version"]
    module.calls, module.behaviour = [], {}
    enums = {kind: enum.IntEnum(kind.split(".")[-1], members) for kind, members in found["enums"].items()}
    for kind, members in found["classes"].items():
        setattr(module, kind, _class(module, kind, members, enums))
    for kind, made in enums.items():
        if "." not in kind:
            setattr(module, kind, made)
    for function, signatures in found["functions"].items():
        setattr(module, function, _call(module, function, signatures))
    return module


def _class(module: Any, kind: str, members: Any, enums: dict[str, Any]) -> type:
    space: dict[str, Any] = {"__slots__": ("__dict__",)}
    for method, signatures in members["methods"].items():
        if signatures:
            space[method] = _call(module, f"{kind}.{method}", signatures)
    settable = set(members["properties"])
    space |= dict.fromkeys(settable)

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


def _call(module: Any, name: str, signatures: list[list[str]]) -> Callable[..., Any]:
    """A function that takes what one of these signatures takes."""
    known = [_signature(parameters) for parameters in signatures]
    own = signatures[0][:1] == ["self"]

    def call(*arguments: Any, **named: Any) -> Any:
        for signature in known[:-1]:
            try:
                bound = signature.bind(*arguments, **named)
                break
            except TypeError:
                continue
        else:
            bound = known[-1].bind(*arguments, **named)
        module.calls.append((name, tuple(bound.args[1:] if own else bound.args)))
        act = module.behaviour.get(name)
        return act(*bound.args) if act is not None else None

    return call


def _signature(parameters: list[str]) -> inspect.Signature:
    made, optional = [], False
    for parameter in parameters:
        name = parameter.rstrip("=")
        optional = optional or parameter.endswith("=")  # Python has no parameter that must be given after one that may
        made.append(
            inspect.Parameter(
                name + "_" * keyword.iskeyword(name),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None if optional else inspect.Parameter.empty,
            )
        )
    return inspect.Signature(made)
