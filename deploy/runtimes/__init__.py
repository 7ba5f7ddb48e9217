"""Runtimes behind the `Runtime` protocol, each in its file, in an explicit table.

A new runtime is a file and a line in the table. Importing this needs none of the libraries.
"""

import difflib
from dataclasses import dataclass

from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.deploy.choices import BatchProfile
from upvits.deploy.runtimes import onnxruntime_
from upvits.deploy.runtimes.engine_folder import read_engine
from upvits.deploy.runtimes.interface import (
    BUILD_RECORD,
    Arrays,
    BuildOptions,
    Built,
    CallTimes,
    Engine,
    LayerTime,
    Missing,
    RunOptions,
    Runtime,
    Session,
)
from upvits.deploy.runtimes.onnxruntime_ import open_judged, open_model, open_onnx, where_judged
from upvits.deploy.runtimes.openvino_ import OPENVINO, OPENVINO_GPU
from upvits.deploy.runtimes.tensorrt import TENSORRT
from upvits.deploy.runtimes.tensorrt_rtx import TENSORRT_RTX

__all__ = [
    "BUILD_RECORD",
    "RUNTIMES",
    "Arrays",
    "BatchProfile",
    "BuildOptions",
    "Built",
    "CallTimes",
    "Engine",
    "LayerTime",
    "LeftOut",
    "Missing",
    "RunOptions",
    "Runtime",
    "RuntimeChoice",
    "Session",
    "open_judged",
    "open_model",
    "open_onnx",
    "read_engine",
    "resolve_runtimes",
    "runtime_named",
    "where_judged",
]

_ALL: tuple[Runtime, ...] = (
    onnxruntime_.CPU,
    OPENVINO,
    OPENVINO_GPU,
    onnxruntime_.CUDA,
    onnxruntime_.TENSORRT,
    onnxruntime_.TENSORRT_RTX,
    TENSORRT_RTX,
    TENSORRT,
)
RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in _ALL}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A runtime that `auto` left out, why, and how to get it."""

    name: str
    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class RuntimeChoice:
    """The runtimes to build for, and those left out."""

    runtimes: tuple[Runtime, ...]
    left_out: tuple[LeftOut, ...]


def runtime_named(name: str) -> Runtime:
    """The runtime of this name.

    Raises:
        UserError: no runtime has it; near names and the whole list are given.
    """
    if name in RUNTIMES:
        return RUNTIMES[name]
    near = difflib.get_close_matches(name.lower(), RUNTIMES, n=2, cutoff=0.5)
    raise UserError(
        f"unknown runtime {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        fix=f"Runtimes: {', '.join(RUNTIMES)}, or auto for all that this machine can build.",
    )


def resolve_runtimes(spec: str = "auto") -> RuntimeChoice:
    """The runtimes that a setting stands for.

    Args:
        spec: "auto" for everything that this machine can build, or names separated by commas.

    Returns:
        The runtimes in the order of the table or of `spec`. Only "auto" leaves any out.

    Raises:
        UserError: a name is unknown, or no name was given.
        MissingDependencyError: a runtime that was asked for by name cannot be built for here.
    """
    if spec.strip().lower() == "auto":
        missing = {name: runtime.missing_to_build() for name, runtime in RUNTIMES.items()}
        return RuntimeChoice(
            runtimes=tuple(RUNTIMES[name] for name, lack in missing.items() if lack is None),
            left_out=tuple(LeftOut(name, lack.why, lack.fix) for name, lack in missing.items() if lack is not None),
        )
    names = list(dict.fromkeys(part.strip() for part in spec.split(",") if part.strip()))
    if not names:
        raise UserError("no runtime was named", fix=f"Runtimes: {', '.join(RUNTIMES)}, or auto.")
    chosen = tuple(runtime_named(name) for name in names)
    for runtime in chosen:
        lack = runtime.missing_to_build()
        if lack is not None:
            raise MissingDependencyError(f"{runtime.name} cannot build engines here", why=lack.why, fix=lack.fix)
    return RuntimeChoice(chosen, ())
