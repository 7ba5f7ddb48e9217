"""Building engines with TensorRT 10.9 to 11.x and TensorRT-RTX; `nvinfer_session.py` runs them.

Both libraries have the same Python API as far as it is used here; the module itself is passed in as `trt`. Networks
are strongly typed everywhere (TensorRT 11 knows nothing else), enums are looked up by name because their numbers
changed between versions, and capabilities are probed with `hasattr`. `tests/deploy/runtimes/test_api_surface.py` checks
every name that is used here against all of these versions.
"""

import contextlib
import functools
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from upvits.calib_data.errors import BuildError, UserError
from upvits.deploy.choices import BatchProfile
from upvits.deploy.graphs.facts import GraphFacts, node_name
from upvits.deploy.graphs.files import openable
from upvits.deploy.machine.gpu import compute_capability, release_cached_memory
from upvits.deploy.runtimes.engine_folder import build_failed, check_built, save_engine
from upvits.deploy.runtimes.inspector import read_inspector
from upvits.deploy.runtimes.interface import MOST_WARNINGS, BuildOptions, Engine, Runtime
from upvits.deploy.runtimes.kernels import Compiled, built_from
from upvits.deploy.store.artifacts import atomic_write
from upvits.deploy.store.drafts import scratch_folder

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_LONGEST_WARNING = 500
# First compute capability whose tensor cores take a precision.
_FIRST_TARGET = {"fp8": 89, "bf16": 80, "int8": 72, "fp16": 53}


def compile_engine(
    trt: Any,
    runtime: Runtime,
    model: ModelProto,
    onnx_path: Path,
    options: BuildOptions,
    configure: Callable[[Any], None] = lambda config: None,
) -> memoryview:
    """Build a serialized engine of the graph as it is.

    Args:
        trt: the imported library.
        runtime: the runtime that builds, for messages.
        model: the model, in the precision that it shall run in.
        onnx_path: where it came from, for messages.
        options: batch sizes for axis 0 of inputs where that is dynamic (no other axis may be), the limit of the
            workspace memory pool, and the timing cache.
        configure: sets what is special to a library on the builder configuration.

    Raises:
        BuildError: the parser or the builder refused the model; names the nodes when the library does.
        UserError: the model is above 2 GiB and cannot be written to the disk, from where the parser then reads it.
    """
    with scratch_folder() as work:  # parsers map the file until they are gone
        return _compile(trt, runtime, openable(model, work), model, onnx_path, options, configure)


def _compile(
    trt: Any,
    runtime: Runtime,
    source: bytes | Path,
    model: ModelProto,
    onnx_path: Path,
    options: BuildOptions,
    configure: Callable[[Any], None],
) -> memoryview:
    log = messages(trt)
    log.clear()
    release_cached_memory()
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not (parser.parse_from_file(str(source)) if isinstance(source, Path) else parser.parse(source)):
        raise _not_supported(runtime, onnx_path, _refused_nodes(parser))
    config = builder.create_builder_config()
    # names of ONNX nodes and types of tensors stay in the engine, for the inspector
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if hasattr(trt.BuilderFlag, "TF32"):
        # On by default, and then what is called fp32 multiplies with 10 bits of mantissa.
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.timing_cache is not None:
        _load_timing_cache(config, options.timing_cache)
    configure(config)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        _set_profile(profile, tensor.name, tuple(tensor.shape), options.batch)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _build_error(runtime, onnx_path, model, "\n".join(log.errors[-2:]) or "The builder gave no reason.")
    if options.timing_cache is not None:
        _save_timing_cache(config, options.timing_cache)
    return memoryview(plan)


def inspect_engine(trt: Any, plan: bytes | memoryview) -> Compiled | None:
    """What the inspector says about a plan, on a machine that can run it; None when that cannot be read."""
    library = trt.Runtime(messages(trt))
    cuda_engine = library.deserialize_cuda_engine(plan)
    if cuda_engine is None:
        return None
    inspector = cuda_engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return read_inspector(text, getattr(cuda_engine, "device_memory_size_v2", None))


def build_engine(
    trt: Any,
    runtime: Runtime,
    model: ModelProto,
    onnx_path: Path,
    folder: Path,
    options: BuildOptions,
    *,
    targets: tuple[str, ...],
    facts: GraphFacts,
    read: Callable[[memoryview], Compiled | None],
    configure: Callable[[Any], None] = lambda config: None,
) -> Engine:
    """Build an engine of the graph as it is and put it into its folder, when it is what was asked for.

    Args:
        trt, runtime, model, onnx_path, options, configure: as in `compile_engine`.
        folder: the engine folder.
        targets: the GPUs that it is for.
        facts: of the model.
        read: says what was compiled, from a serialized engine.

    Raises:
        GateError: it is less than was asked for.
        BuildError, UserError: as `compile_engine` raises them.
    """
    started = time.perf_counter()
    plan = compile_engine(trt, runtime, model, onnx_path, options, configure)
    seconds = time.perf_counter() - started
    warnings = _warnings(trt, onnx_path)
    built = built_from(read(plan), facts)
    check_built(built, options, runtime)
    return save_engine(
        runtime,
        folder,
        "engine.plan",
        plan,
        options=options,
        targets=targets,
        seconds=seconds,
        library=runtime.name,
        library_version=trt.__version__,
        onnx_path=onnx_path,
        settings={"tf32": False, "strongly_typed": True},
        built=built,
        warnings=warnings,
    )


def _warnings(trt: Any, onnx_path: Path) -> tuple[str, ...]:
    """What the builder warned of, each thing once; kernels that it could not try make a slower engine, so it is said.

    Sources: messages of TensorRT's builder, "Skipping tactic 0x... due to insufficient memory on requested size of ..."
    """
    texts = tuple(dict.fromkeys(" ".join(text.split())[:_LONGEST_WARNING] for text in messages(trt).warnings))
    skipped = [text for text in texts if re.search(r"(?i)skip\w* tactic", text)]
    if skipped:
        what = (
            f"{len(skipped)} kernels were not tried for {onnx_path.name}, so its engine may be slower than it could be"
        )
        _LOG.warning("%s; the builder said: %s", what, skipped[0])
    return (*skipped, *(text for text in texts if text not in skipped))[:MOST_WARNINGS]


def has_precision(target: str, precision: str) -> bool:
    """Whether the tensor cores of a target such as "sm86" have a precision."""
    return int(target[2:]) >= _FIRST_TARGET.get(precision, 0)


def check_targets(runtime_name: str, precisions: Iterable[str], targets: Sequence[str]) -> None:
    """Refuse precisions that a target's tensor cores lack, before anything is built.

    Raises:
        UserError: names the target and the first that has the precision.
    """
    for name in precisions:
        lacking = [target for target in targets if not has_precision(target, name)]
        if lacking:
            first = _FIRST_TARGET[name]
            raise UserError(
                f"{runtime_name} cannot build {name} for {', '.join(lacking)}",
                why=f"The first GPUs with {name} arithmetic are sm{first}; an engine for several targets has the "
                "same graph for all of them.",
                fix=f"Leave out targets below sm{first}, or use another precision for them.",
            )


def refuse_operators(runtime: Runtime, model: ModelProto, onnx_path: Path, refused: Mapping[str, str]) -> None:
    """Refuse operators that a library parses and then fails to build.

    Args:
        refused: reason by ONNX operator.

    Raises:
        BuildError: names every such node.
    """
    refused_nodes = [
        (node_name(node), node.op_type, refused[node.op_type]) for node in model.graph.node if node.op_type in refused
    ]
    if refused_nodes:
        raise _not_supported(runtime, onnx_path, refused_nodes)


def check_version(engine: Engine, version: str) -> None:
    """Refuse an engine that another version of the library built; such engines are not portable.

    Raises:
        UserError: says both versions.
    """
    if engine.library_version != version:
        raise UserError(
            f"{engine.path} was built with {engine.library} {engine.library_version}",
            why=f"Installed is {version}; engines open only with the version that built them.",
            fix=f"Install {engine.library} {engine.library_version}, or build the engine again.",
        )


def check_device(engine: Engine) -> None:
    """Refuse an engine that was built for other GPUs than that of this machine.

    Raises:
        UserError: says both.
    """
    device = device_here()
    if engine.targets and device not in engine.targets:
        raise UserError(
            f"{engine.path} was built for {', '.join(engine.targets)}",
            why=f"The GPU of this machine is {device}.",
            fix=f"Build it again with {device} among the targets.",
        )


def device_here() -> str:
    """This machine's GPU as a build target, such as "sm89"; "none" without a GPU."""
    capability = compute_capability()
    return f"sm{capability[0]}{capability[1]}" if capability else "none"


def is_out_of_memory(reason: str) -> bool:
    """Whether a library's message speaks of GPU memory that ran out."""
    said = reason.lower().replace("_", " ")
    return any(words in said for words in ("out of memory", "outofmemory", "insufficient memory", "memory allocation"))


@functools.cache
def messages(trt: Any) -> Any:
    """The logger of a library: keeps errors in `errors` and warnings in `warnings` instead of printing them.

    One for each library and for good: NVIDIA's libraries hold on to the first logger that they get, also after the
    object that brought it is gone, and crash when it is collected.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

        def clear(self) -> None:
            self.errors.clear()
            self.warnings.clear()

    return Messages()


def _set_profile(profile: Any, name: str, shape: tuple[int, ...], batch: BatchProfile) -> None:
    sample = shape[1:]
    if any(size < 0 for size in sample):
        raise UserError(
            f"input {name} has shape {shape}",
            why="Only the batch axis may be dynamic in an engine.",
            fix="Export the model with a fixed image size.",
        )
    if not shape:
        profile.set_shape(name, (), (), ())
        return
    sizes = (batch.min, batch.opt, batch.max) if shape[0] < 0 else (shape[0],) * 3
    profile.set_shape(name, *((size, *sample) for size in sizes))


def _load_timing_cache(config: Any, path: Path) -> None:
    """Start from the timings of earlier builds. A cache that is broken or of another device is no reason to fail."""
    for content in (_read(path), b""):
        try:
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return
        except (RuntimeError, TypeError, ValueError):
            continue


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        with contextlib.suppress(OSError):  # the engine is built; only the next build takes longer
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, memoryview(cache.serialize()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _refused_nodes(parser: Any) -> list[tuple[str, str, str]]:
    """Name, operator and reason of every node that the parser refused."""
    refused = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        # without a GPU the library complains about that too, which is not the cause
        said = [line for line in error.desc().strip().splitlines() if "catchCudaError" not in line]
        name = error.node_name() if hasattr(error, "node_name") else ""
        operator = error.node_operator() if hasattr(error, "node_operator") else ""
        reason = " ".join(said)
        refused.append((name, operator, reason if reason not in ("", "false") else "the library does not have it"))
    return refused


def _not_supported(runtime: Runtime, onnx_path: Path, refused: Collection[tuple[str, str, str]]) -> BuildError:
    """The error that names all nodes that were refused, each with its operator and the reason."""
    lines = list(dict.fromkeys(f"{name or 'without a name'} ({operator}): {why}" for name, operator, why in refused))
    nodes = ", ".join(dict.fromkeys(f"{name or 'without a name'} ({operator})" for name, operator, _ in refused))
    return BuildError(
        f"{runtime.name} cannot build {onnx_path.name}" + (f": node {nodes}" if nodes else ""),
        why="\n".join(lines) or "The parser gave no reason.",
        fix="No engine was written. Export without these operators, or use another runtime.",
    )


def _build_error(runtime: Runtime, onnx_path: Path, model: ModelProto, reason: str) -> BuildError:
    if is_out_of_memory(reason):
        return BuildError(
            f"{runtime.name} ran out of GPU memory while building {onnx_path.name}",
            why=reason,
            fix="Build with a smaller largest batch (--batch 1:8:16), limit scratch memory (--workspace, in MiB), or "
            "free GPU memory.",
        )
    return build_failed(runtime, onnx_path, model, reason)
