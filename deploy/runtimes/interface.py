"""What a runtime is: it builds an engine folder from an ONNX file, and opens one to run it.

An engine folder holds the engine itself and `build.json`, the record of how it was made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from calib_data.errors import UserError

Arrays = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True, slots=True)
class Missing:
    """What this machine lacks for a runtime, and how to get it."""

    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """Batch sizes that an engine accepts (`min` to `max`) and the one that it is tuned for (`opt`)."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UserError(
                f"batch profile {self.min}:{self.opt}:{self.max} is not in order",
                why="An engine needs 1 <= smallest <= tuned-for <= largest batch.",
                fix="Give it as min:opt:max, for example 1:8:32.",
            )


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        precision: "fp32" or "fp16".
        batch: batch sizes; runtimes without profiles accept every batch.
        targets: devices to build for, such as ("sm86", "sm89"); empty is the runtime's default.
        workspace_mib: most scratch memory an engine may use, in MiB; None leaves it to the runtime.
    """

    precision: str = "fp32"
    batch: BatchProfile = field(default_factory=BatchProfile)
    targets: tuple[str, ...] = ()
    workspace_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine: where it is and what it is.

    Attributes:
        path: the engine file, inside the engine folder.
        bytes: its size.
        seconds: wall time of the build.
        library_version: version of the runtime's library that built it (engines of TensorRT open with no other).
        onnx_sha256: digest of the ONNX file that it was built from, before any change of precision.
        settings: runtime-specific facts, such as {"tf32": False}.
    """

    runtime: str
    precision: str
    targets: tuple[str, ...]
    path: Path
    bytes: int
    seconds: float
    sha256: str
    library: str
    library_version: str
    onnx_sha256: str
    batch: BatchProfile
    settings: Mapping[str, str | int | bool]

    @property
    def folder(self) -> Path:
        """The engine folder, which holds `build.json` too."""
        return self.path.parent


class Session(Protocol):
    """A model that is loaded and ready to run."""

    @property
    def input_names(self) -> tuple[str, ...]: ...

    @property
    def output_names(self) -> tuple[str, ...]: ...

    @property
    def settings(self) -> Mapping[str, str | int | bool]:
        """What it runs on and how: device, threads and the like, for reports."""
        ...

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """Outputs by name for inputs by name; arrays on the host."""
        ...

    def close(self) -> None:
        """Give back memory; the session cannot run afterwards."""
        ...

    def __enter__(self) -> "Session": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Runtime(Protocol):
    """One way to run a model. Importing and listing runtimes needs none of their libraries."""

    @property
    def name(self) -> str: ...

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that `build` accepts."""
        ...

    def missing_to_build(self) -> Missing | None:
        """What this machine lacks to build engines; None when nothing."""
        ...

    def missing_to_run(self) -> Missing | None:
        """What this machine lacks to run engines; None when nothing."""
        ...

    def build(self, onnx_path: Path, folder: Path, options: BuildOptions) -> Engine:
        """Build an engine into `folder`, all of it or nothing.

        Raises:
            UserError: the ONNX file, a precision or a target is not usable.
            MissingDependencyError: the library, or a device that building needs, is not there.
            BuildError: the runtime refused the model; says at which node and why.
        """
        ...

    def open(self, folder: Path) -> Session:
        """Open an engine folder.

        Raises:
            UserError: it is not a whole engine of this runtime, or was built for another device or version.
            MissingDependencyError: the library or a device is not there.
        """
        ...
