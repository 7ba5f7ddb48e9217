"""Reading torch files without running anything: tensors, plain values, and the few kinds of object that training
scripts keep beside them (`argparse.Namespace`, configuration dictionaries, numpy scalars, paths).

torch's own closed unpickler reads the file. It gets a fixed table of names; behind each of them stands a class or
function of this file that only stores what it is given. Any other name ends the reading.
"""

from __future__ import annotations

import mmap
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


def name_of(key: object) -> str:
    """The name that a key stands for; "" for anything but text and usual numbers: text of it may fill memory."""
    if isinstance(key, int):
        return str(key) if key.bit_length() < 64 else ""
    return key if isinstance(key, str) else ""


class Record:
    """Stands for an object with attributes; `vars()` gives them."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({name_of(name): value for name, value in state.items()})


class _Mapping:
    """Stands for subclasses of dict: unpickling one gives an OrderedDict."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _Type:
    """Stands for numpy's dtype."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.code, self.order = name_of(code), ""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def read(self, data: object) -> np.ndarray[Any, Any] | None:
        """The numbers in raw bytes; None for anything but plain numbers."""
        if not isinstance(data, bytes) or self.code[:1] not in ("f", "i", "u", "b"):
            return None
        return np.frombuffer(data, np.dtype(self.order + self.code))


class Array:
    """Stands for a numpy array; `tensor` is None where it holds anything but numbers."""

    def __init__(self, *_: object) -> None:
        self.tensor: torch.Tensor | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Type):
            return
        numbers = state[2].read(state[4])
        if numbers is not None:
            shaped = numbers.reshape(state[1], order="F" if state[3] else "C")
            self.tensor = torch.from_numpy(np.ascontiguousarray(shaped.astype(shaped.dtype.newbyteorder("="))))


def _scalar(kind: object, data: object = b"") -> float | int | bool | None:
    numbers = kind.read(data) if isinstance(kind, _Type) else None
    value: float | int | bool | None = None if numbers is None or numbers.size != 1 else numbers[0].item()
    return value


def _array(*_: object) -> Array:
    return Array()


def _path(*parts: object) -> str:
    return "/".join(map(name_of, parts)).replace("//", "/")


def _mapping(*_: object) -> OrderedDict[Any, Any]:
    return OrderedDict()


class _Kind:
    """Stands for a class that is only mentioned, such as the default of a dictionary."""


_RECORDS = ("argparse.Namespace", "types.SimpleNamespace", "mmengine.logging.history_buffer.HistoryBuffer")
_MAPPINGS = (
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "addict.Dict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
_TABLE: dict[str, Callable[..., object]] = {
    **dict.fromkeys(_RECORDS, Record),
    **dict.fromkeys(_MAPPINGS, _Mapping),
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **{f"builtins.{name}": _Kind for name in ("list", "dict", "int", "float", "str", "tuple")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    "collections.defaultdict": _mapping,
    "numpy.dtype": _Type,
    "numpy.ndarray": Array,
}


_GROWS = b"bytearray"  # torch's own table has it, and `bytearray(10**11)` fills the memory


def _require_modest(path: Path) -> None:
    """Refuse what asks for more memory than the file has bytes: compressed entries (`torch.save` makes none), and the
    one name of torch's table that makes much from a number.
    """
    if not zipfile.is_zipfile(path):  # a file of torch before 1.6: pickles, then the tensors as they are
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_GROWS) >= 0:
                raise ValueError("it makes a bytearray")
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its entries are compressed, which torch.save never does")
            if entry.filename.endswith(".pkl") and _GROWS in archive.read(entry):
                raise ValueError("it makes a bytearray")


def read_pickle(path: Path) -> object:
    """The object in a file of `torch.save`, on the CPU; objects of the table as their stand-ins.

    Raises:
        Exception: of any kind, where the file is damaged or holds anything else.
    """
    _require_modest(path)
    with warnings.catch_warnings(), safe_globals([(stand_in, name) for name, stand_in in _TABLE.items()]):
        warnings.simplefilter("ignore")  # torch warns of unusual pickles; what matters is whether it reads them
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def foreign_names(path: Path) -> list[str]:
    """Classes and functions in a torch file that are not read; empty where that cannot be told. Runs nothing."""
    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:
        return []
    return sorted({str(name) for name in names} - set(_TABLE))
