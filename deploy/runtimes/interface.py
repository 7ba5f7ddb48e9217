"""What a runtime is: it builds an engine folder from an ONNX file, and opens such a folder to run it.

An engine folder holds the engine itself and `build.json`, the record of how it was made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from upvits.calib_data.documents import Count, Name, Number
from upvits.deploy.choices import BatchProfile

Arrays = Mapping[str, np.ndarray[Any, np.dtype[Any]]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Missing:
    """What this machine lacks for a runtime, and how to get it."""

    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        precision: what the graph was converted to: "fp32", "fp16", "bf16", "int8" or "fp8". Runtimes build the graph
            as it is (see `deploy/precision`); the name says what to expect of the engine.
        batch: batch sizes; runtimes without profiles accept every batch.
        targets: devices to build for, such as ("sm86", "sm89"); empty is the runtime's default.
        workspace_mib: most scratch memory an engine may use, in MiB; None leaves it to the runtime.
        timing_cache: file that keeps the builder's timings between builds, where the library has such a cache.
        require_fused_attention: refuse an engine in which an attention block is not a single fused kernel.
    """

    precision: str = "fp32"
    batch: BatchProfile = field(default_factory=BatchProfile)
    targets: tuple[str, ...] = ()
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    require_fused_attention: bool = False


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run an engine.

    Attributes:
        threads: threads inside operators on CPUs; None takes what the engine was tuned to.
        cuda_graph: record the work of a call once and replay it, on GPUs; cuts the host's share of small batches.
    """

    threads: int | None = None
    cuda_graph: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """What a runtime really made of a graph.

    Attributes:
        source: where this was read, for example "engine inspector" or "compiled graph in the plan".
        layers: kernels or layers that run.
        by_precision: layers by the precision that they compute in ("fp32", "fp16", "bf16", "int8", "fp8", "other").
        gemms: matrix products and convolutions with constant weights, by precision; "removed" counts those that no
            kernel computes, because their result is constant or unused.
        planned: the same as the ONNX graph asks for it.
        attention_blocks: attention blocks of the ONNX graph.
        attention_fused: how many of them are a single fused kernel; None where the runtime does not tell.
        casts: layers that only change the type of a tensor.
        reformats: layers that only move or reorder a tensor.
        memory_bytes: scratch memory for activations at the largest batch; None where the runtime does not tell.
    """

    source: Name
    layers: Count
    by_precision: Mapping[Name, Count]
    gemms: Mapping[Name, Count]
    planned: Mapping[Name, Count]
    attention_blocks: Count
    attention_fused: Count | None
    casts: Count
    reformats: Count
    memory_bytes: Count | None


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Times of calls in seconds, float64 [N] each.

    Attributes:
        total: host wall time, host to host: input copied to the device, computed, output copied back; on CPUs the
            call itself.
        h2d: input to the device; None on CPUs, or where the runtime does not tell.
        compute: on the device.
        d2h: output from the device.
        enqueue: host time to submit the work.
    """

    total: Floats
    h2d: Floats | None = None
    compute: Floats | None = None
    d2h: Floats | None = None
    enqueue: Floats | None = None


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer of a session, as its runtime's profiler sees it.

    Attributes:
        name: names of the ONNX nodes in it, as far as the runtime tells.
        op: kind of layer, for example "MatMul", "LayerNormalization", "attention", "reformat".
        ms: median over calls, in milliseconds.
        precision: what it computes in.
        bytes: activations and weights that it reads and writes; None where the runtime does not tell.
    """

    name: str
    op: str
    ms: float
    precision: str = "other"
    bytes: int | None = None


BUILD_RECORD = "build.json"
MOST_WARNINGS = 50  # of a builder that are kept


def _plain(name: str) -> str:
    if name == BUILD_RECORD:
        raise ValueError(f"{name!r} is not the name of a file of an engine")
    return name


# What stands in `build.json` goes on into names of files, scripts and requirements: nothing but plain names.
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
_File = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"), AfterValidator(_plain)]
_MOST_THREADS = 1024
_Digest = Annotated[str, Field(max_length=64)]
_Version = Annotated[str, Field(pattern=r"^[0-9][A-Za-z0-9.+_-]{0,63}$")]
_Device = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:()+ -]{0,127}$")]


class Engine(BaseModel):
    """A built engine. `build.json` in its folder holds all of this except where the folder is.

    Attributes:
        format_version: of `build.json`; 2 added `built`.
        folder: the engine folder.
        file: name of the engine file in it.
        bytes: size of all files of the engine.
        seconds: wall time of the build.
        sha256: of the engine file.
        library_version: version of the runtime's library that built it (engines of TensorRT open with no other).
        onnx_sha256: digest of the ONNX file that it was built from.
        settings: runtime-specific facts, such as {"tf32": False}.
        built: what the runtime made of the graph; None where it cannot be read.
        more: sha256 by name of the files that the engine file needs beside it.
        warnings: what the builder warned of, such as kernels that it did not try for lack of memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1, 2] = 2
    folder: Path = Field(default=Path(), exclude=True)
    runtime: _Name
    precision: _Name
    targets: tuple[_Device, ...]
    file: _File
    bytes: Count
    seconds: Number
    sha256: _Digest
    library: _Name
    library_version: _Version
    onnx_sha256: _Digest
    batch: BatchProfile
    settings: Mapping[Name, bool | int | Name]
    built: Built | None = None
    more: Mapping[_File, _Digest] = {}
    warnings: tuple[Name, ...] = Field(default=(), max_length=MOST_WARNINGS)

    @property
    def path(self) -> Path:
        """The engine file."""
        return self.folder / self.file

    def threads(self, name: str) -> int:
        """The number of threads in the settings under this name; 0 where there is none."""
        value = self.settings.get(name)
        return value if isinstance(value, int) and 0 < value <= _MOST_THREADS else 0


DEFAULT_RUN = RunOptions()


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

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU, of whichever maker: its clocks fall while it waits."""
        ...

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """Outputs by name for inputs by name; arrays on the host."""
        ...

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        """Time so many calls with the same inputs, in buffers that are bound once, without warm-up."""
        ...

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[LayerTime, ...]:
        """Profile so many calls, in the order of execution; empty where the runtime has no profiler."""
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

    @property
    def base_precision(self) -> str:
        """What layers that are not quantized compute in, in an int8 or fp8 engine: "fp16", or "fp32" on devices
        without fp16 arithmetic."""
        ...

    @property
    def on_cpu(self) -> bool:
        """Whether engines run on the CPU."""
        ...

    @property
    def on_nvidia(self) -> bool:
        """Whether engines run on an NVIDIA GPU, which NVML knows."""
        ...

    @property
    def has_targets(self) -> bool:
        """Whether an engine is built for GPUs of some compute capabilities, and runs on no other ones."""
        ...

    @property
    def has_batch_profile(self) -> bool:
        """Whether an engine refuses batches outside the `BatchProfile` that it was built for."""
        ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions an engine depends on."""
        ...

    def missing_to_build(self) -> Missing | None:
        """What this machine lacks to build engines; None when nothing."""
        ...

    def missing_to_run(self) -> Missing | None:
        """What this machine lacks to run engines; None when nothing."""
        ...

    def targets_for(self, precision: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        """The devices that an engine would be built for: `targets`, or by default the usual ones that have the
        precision. Empty for runtimes whose engines are for no particular device.

        Raises:
            UserError: a target is unknown, cannot be built for here, or lacks the precision.
        """
        ...

    def build(self, onnx_path: Path, folder: Path, options: BuildOptions) -> Engine:
        """Build an engine of the graph as it is into `folder`, all of it or nothing.

        Raises:
            UserError: the ONNX file, a precision or a target is not usable.
            GateError: fewer layers than the graph asks for run in int8, fp8 or half precision, or attention that has
                to be fused is not.
            MissingDependencyError: the library, or a device that building needs, is missing.
            BuildError: the runtime refused the model; says at which node and why.
        """
        ...

    def open(self, folder: Path, options: RunOptions = DEFAULT_RUN) -> Session:
        """Open an engine folder.

        Raises:
            UserError: it is not a whole engine of this runtime, or was built for another device or version.
            MissingDependencyError: the library or a device is missing.
        """
        ...
