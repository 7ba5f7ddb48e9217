"""A quick start: torchvision and timm import torch's compiler for what no command here does, and it takes as long as
all the rest of them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_UTILS = f"{_COMPILER}.utils"


def leave_out_compiler() -> None:
    """Let timm and torchvision be imported without `torch._dynamo`, until something wants it: then it comes whole.

    At import, `torchvision.ops.roi_align` takes one function from there, and a model of timm that is none of ours asks
    not to be compiled. Both are answered when they are called. For the process of a command only: it imports nothing
    before, and is nobody's library.
    """
    if not sys.modules.keys() & {_COMPILER, "torchvision", "timm"}:
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Sees imports before they happen."""

    def __init__(self) -> None:
        self._disable: Callable[..., Any] | None = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name in ("timm", "torchvision") and self._disable is None:
            import torch

            self._disable, torch.compiler.disable = torch.compiler.disable, _disable_later
            sys.modules.setdefault(_UTILS, _StandIn(_UTILS))
        elif name == _COMPILER:
            self._step_aside()

    def _step_aside(self) -> None:
        """Before the first line of the compiler runs."""
        sys.meta_path.remove(self)
        if self._disable is not None:
            sys.modules["torch.compiler"].disable = self._disable  # type: ignore[attr-defined]
        if isinstance(sys.modules.get(_UTILS), _StandIn):
            del sys.modules[_UTILS]


class _StandIn(ModuleType):
    """Two questions can be put to the compiler's utilities without importing it: whether they are there, and this."""

    @staticmethod
    def is_compile_supported(device_type: str) -> Any:
        return _utils().is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        return getattr(_utils(), name)


def _utils() -> Any:
    importlib.import_module(_COMPILER)  # the stand-in goes
    return importlib.import_module(_UTILS)


def _disable_later(fn: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Callable[..., Any]:
    """`torch.compiler.disable` at the first call of a function instead of at its definition."""
    if fn is None:
        return functools.partial(_disable_later, **options)

    @functools.wraps(fn)
    def called(*given: Any, **named: Any) -> Any:
        return importlib.import_module(_COMPILER).disable(fn, *args, **options)(*given, **named)

    return called
