"""Engine folders: what every runtime does before and after it builds.

An engine folder holds the engine file, other files that this file needs, and `build.json`. That is written last: a
folder without it is no engine.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto, NodeProto

from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import BuildError, GateError, MissingDependencyError, UserError
from upvits.calib_data.paths import path_inside
from upvits.deploy.graphs.files import data_path, load_model, model_digest
from upvits.deploy.runtimes.interface import BUILD_RECORD, BuildOptions, Built, Engine, Missing, Runtime
from upvits.deploy.store.artifacts import atomic_write, file_digest, whole_file
from upvits.deploy.store.disk import disk_full_error, is_disk_full, unwritable_error

_NARROW = ("fp16", "bf16", "int8", "fp8")
_REBUILD = "Build it again with `upvits-deploy engine`."


def check_request(runtime: Runtime, onnx_path: Path, folder: Path, options: BuildOptions) -> ModelProto:
    """Refuse everything that can be refused before a build, and read the model.

    Raises:
        UserError: the runtime does not have the precision, the folder holds something else, or the file is no ONNX
            model.
        MissingDependencyError: the machine lacks what the runtime needs to build.
    """
    if options.precision not in runtime.precisions:
        raise UserError(
            f"{runtime.name} does not build {options.precision!r}",
            fix=f"Precisions of {runtime.name}: {', '.join(runtime.precisions)}.",
        )
    require(runtime.missing_to_build(), f"{runtime.name} cannot build engines here")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", fix="Choose another folder for the engine.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / BUILD_RECORD).is_file():
        raise UserError(
            f"{folder} is not empty and is not an engine folder",
            why=f"It holds files but no {BUILD_RECORD}; writing there could overwrite something of yours.",
            fix="Choose another folder for the engine.",
        )
    return load_model(onnx_path)


def no_targets(runtime: Runtime, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets of a runtime whose engines are for no particular device: none.

    Raises:
        UserError: some were given.
    """
    if targets:
        raise UserError(f"{runtime.name} builds for no particular device", fix="Leave the targets out for it.")
    return ()


def require(missing: Missing | None, what: str) -> None:
    """Raise MissingDependencyError when something is missing."""
    if missing is not None:
        raise MissingDependencyError(what, why=missing.why, fix=missing.fix)


def check_built(built: Built | None, options: BuildOptions, runtime: Runtime) -> None:
    """Refuse an engine that is less than what its graph asks for. What cannot be read passes.

    Raises:
        GateError: fewer matrix products and convolutions run in int8, fp8 or half precision than planned, or an
            attention block is not fused although `options.require_fused_attention`.
    """
    if built is None:
        return
    removed = built.gemms.get("removed", 0)
    # "fp32" names graphs of which nothing narrower is expected, whatever they ask for: `bench` measures any
    for precision in _NARROW if options.precision != "fp32" else ():
        planned, made = built.planned.get(precision, 0), built.gemms.get(precision, 0)
        if made + removed < planned:
            others = ", ".join(f"{count} in {name}" for name, count in built.gemms.items() if name != precision)
            raise GateError(
                f"{runtime.name} built {made} of {planned} {precision} layers",
                why=f"Of the graph's matrix products and convolutions, {others or 'none'} are in the engine instead "
                f"({built.source}).",
                fix=f"Use a precision that {runtime.name} follows for this model, or another runtime.",
            )
    fused = built.attention_fused
    if options.require_fused_attention and fused is not None and fused < built.attention_blocks:
        raise GateError(
            f"{runtime.name} fused {fused} of {built.attention_blocks} attention blocks",
            why=f"The others run as separate matrix products and softmax, which is slower ({built.source}).",
            fix=_to_fuse(options.precision, runtime),
        )


def _to_fuse(precision: str, runtime: Runtime) -> str:
    """What to do about attention that is not fused."""
    if runtime.on_cpu:
        return (
            f"{runtime.name} does not fuse this attention on this machine: --require-fused-attention is for engines of "
            "GPUs. Leave it out, or leave this runtime out."
        )
    shape = "Fused kernels need head_dim to be a multiple of 8 in 16..256 (--align 8)"
    if precision == "fp32":
        return f"{shape} and half precision around the softmax (--precision fp16 or int8)."
    return f"{shape}; for int8 attention 16, 32 or 64." if precision == "int8" else f"{shape}."


def save_engine(
    runtime: Runtime,
    folder: Path,
    file: str,
    content: bytes | memoryview | Path,
    *,
    options: BuildOptions,
    targets: tuple[str, ...],
    seconds: float,
    library: str,
    library_version: str,
    onnx_path: Path,
    settings: Mapping[str, str | int | bool],
    built: Built | None = None,
    warnings: tuple[str, ...] = (),
) -> Engine:
    """Write the engine's files, then `build.json`; each appears whole or not at all.

    Args:
        file: name of the engine file.
        content: of the engine file, or an ONNX file of this name with its weights in a file beside it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    more: dict[str, Path] = {}
    if isinstance(content, Path):
        weights = data_path(content)
        content, more = content.read_bytes(), {weights.name: weights}
    engine = Engine(
        folder=folder,
        runtime=runtime.name,
        precision=options.precision,
        targets=targets,
        file=file,
        bytes=len(content) + sum(source.stat().st_size for source in more.values()),
        seconds=round(seconds, 3),
        sha256=hashlib.sha256(content).hexdigest(),
        library=library,
        library_version=library_version,
        onnx_sha256=model_digest(onnx_path),
        batch=options.batch,
        settings=dict(settings),
        built=built,
        more={name: file_digest(source) for name, source in more.items()},
        warnings=warnings,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # An interrupted replacement must not leave a new engine under an old record.
        (folder / BUILD_RECORD).unlink(missing_ok=True)
        data_path(folder / file).unlink(missing_ok=True)  # the weights of an older engine
        for name, source in more.items():
            with source.open("rb") as read, whole_file(folder / name) as written:
                shutil.copyfileobj(read, written, 1 << 20)
        atomic_write(folder / file, content)
        atomic_write(folder / BUILD_RECORD, (engine.model_dump_json(indent=2) + "\n").encode())
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(folder, f"the {runtime.name} engine could not be saved") from error
        raise unwritable_error(folder, error) from error
    return engine


def read_engine(folder: Path, runtime: str | None = None) -> Engine:
    """The engine in a folder, checked: its record is readable, its file is whole and it is of this runtime.

    Raises:
        UserError: it is none of that.
    """
    path = folder / BUILD_RECORD
    if not path.is_file():
        raise UserError(f"{folder} is not an engine folder", why=f"It has no {BUILD_RECORD}.", fix=_REBUILD)
    engine = read_document(path, Engine, fix=_REBUILD).model_copy(update={"folder": folder})
    if runtime is not None and engine.runtime != runtime:
        raise UserError(
            f"{folder} holds an engine of {engine.runtime}, not of {runtime}",
            fix=f"Open it with {engine.runtime}, or build an engine for {runtime}.",
        )
    if not engine.path.is_file():
        raise UserError(f"{folder} has no engine file", why=f"{BUILD_RECORD} names {engine.file!r}.", fix=_REBUILD)
    for name, sha256 in {engine.file: engine.sha256, **engine.more}.items():
        _check_file(path_inside(folder, name), sha256)
    return engine


def runnable_engine(runtime: Runtime, folder: Path) -> Engine:
    """The checked engine of this runtime in a folder, on a machine that has what it needs to run.

    Raises:
        UserError: the folder holds no such engine.
        MissingDependencyError: the machine lacks something.
    """
    engine = read_engine(folder, runtime.name)
    require(runtime.missing_to_run(), f"{runtime.name} engines cannot run here")
    return engine


def _check_file(file: Path, sha256: str) -> None:
    if not file.is_file():
        raise UserError(f"{file.parent} lacks a file of its engine", why=f"{file.name} is missing.", fix=_REBUILD)
    digest = file_digest(file)
    if digest != sha256:
        raise UserError(
            f"{file} is damaged",
            why=f"Its sha256 is {digest[:12]}..., {BUILD_RECORD} says {sha256[:12]}...: it was cut or changed.",
            fix=_REBUILD,
        )


def build_failed(runtime: Runtime, onnx_path: Path, model: ModelProto, reason: str) -> BuildError:
    """The error for a model that a runtime refused, with the node that its message speaks of."""
    node = _node_named_in(reason, model)
    return BuildError(
        f"{runtime.name} cannot build {onnx_path.name}" + (f": node {node}" if node else ""),
        why=reason,
        fix="No engine was written. Another runtime or precision may take this model.",
    )


def _node_named_in(reason: str, model: ModelProto) -> str:
    """Name and operator of the node in a message; libraries differ in wording, but all quote names."""
    named = [node for node in model.graph.node if node.name and node.name in reason]
    typed = [node for node in model.graph.node if _operator_pattern(node).search(reason)]
    node = max(named, key=lambda node: len(node.name), default=None) or next(iter(typed), None)
    return f"{node.name or 'without a name'} ({node.op_type})" if node is not None else ""


def _operator_pattern(node: NodeProto) -> re.Pattern[str]:
    """An operator as libraries write it: "domain:Operator(", "domain.Operator", or in a list of "operations: "."""
    domain, operator = re.escape(node.domain), re.escape(node.op_type)
    return re.compile(rf"{domain}:{operator}\(|operations?: [\w., ]*\b{operator}\b")
