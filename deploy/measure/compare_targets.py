"""What `upvits-deploy bench` measures: ONNX files, engine folders and runs, ours or not, and inputs for them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import ModelProto, TensorProto, ValueInfoProto

from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.graphs.files import declared_only, inferred_graph, load_model
from upvits.deploy.graphs.nodes import copied, graph_inputs
from upvits.deploy.runtimes import BUILD_RECORD, RUNTIMES, Arrays, Engine, Runtime, read_engine, runtime_named
from upvits.deploy.runtimes.engine_folder import require
from upvits.deploy.runtimes.nvinfer import device_here
from upvits.deploy.store.artifacts import has_final_name, open_artifact
from upvits.deploy.store.run_dir import RECIPE

_MEMORY_SHARE = 0.25  # of what is free, for the inputs of one call
_LARGEST = 3  # tensors that a call holds at the same time, about
_NARROW_FIRST = ("fp8", "int8", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a model. Sizes are None where they are open; no sizes at all where nothing is known."""

    name: str
    dtype: np.dtype[np.generic]
    sizes: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class Target:
    """One model in one runtime.

    Attributes:
        name: unique among all that are compared.
        label: the same without runtime and precision.
        path: what was asked for.
        folder: the engine folder; None for an ONNX file, which is yet to be built.
        inputs: as the ONNX file has them; empty where none is at hand.
        graph: of that file, large weights left out; None where none is at hand.
        optional: left out with a reason when it does not work, because nobody asked for this runtime by name.
    """

    name: str
    label: str
    path: Path
    runtime: Runtime
    precision: str
    folder: Path | None
    inputs: tuple[Input, ...]
    graph: ModelProto | None
    optional: bool


@dataclass(frozen=True, slots=True)
class Skipped:
    """An engine of a run that is not measured, and why."""

    name: str
    why: str


def find_targets(paths: Sequence[Path], runtimes: str, batches: Sequence[int]) -> tuple[list[Target], list[Skipped]]:
    """Say what is to be measured.

    Args:
        paths: ONNX files, engine folders, run directories.
        runtimes: names separated by commas, for ONNX files and to choose among the engines of runs; "auto": CPU
            runtimes that work here for the files, and all engines of runs.
        batches: batch sizes that the engines have to take.

    Raises:
        UserError: a path is none of these or is broken, an engine that was named itself does not run here or does not
            take these batch sizes, or nothing is left.
        MissingDependencyError: an engine that was named itself is of a runtime that does not work here.
    """
    wanted = None if runtimes.strip().lower() == "auto" else tuple(_named_runtimes(runtimes))
    labels = _short_names(paths)
    targets: list[Target] = []
    skipped: list[Skipped] = []
    for path, label in zip(paths, labels, strict=True):
        if path.is_file() and path.suffix == ".onnx":
            found, left_out = _of_file(path, label, wanted)
            targets += found
            skipped += left_out
        elif (path / BUILD_RECORD).is_file():
            engine = read_engine(path)
            require(runtime_named(engine.runtime).missing_to_run(), f"{path} cannot be measured here")
            if (why := _in_the_way(engine, batches)) is not None:
                raise UserError(
                    f"{path} cannot be measured", why=why, fix="Choose other batch sizes or another engine."
                )
            targets.append(_of_engine(path, label, path, engine, optional=False))
        elif (path / RECIPE).is_file():
            found, left_out = _of_run(path, label, wanted, batches)
            targets += found
            skipped += left_out
        else:
            raise _unknown(path)
    if not targets:
        why = "; ".join(f"{one.name}: {one.why}" for one in skipped) or "Nothing was named."
        raise UserError("nothing to measure", why=why, fix="Name ONNX files, engine folders or runs with engines.")
    return targets, skipped


def random_feeds(inputs: Sequence[Input], batch: int, shapes: Mapping[str, tuple[int, ...]], model: str) -> Arrays:
    """Random inputs of one call.

    Args:
        inputs: of the model.
        batch: taken for the first axis of every input where it is open.
        shapes: sizes by input name for what the model leaves open; a first axis that is open follows `batch`.
        model: name for messages.

    Raises:
        UserError: a size is open and not given, contradicts the model, or the arrays would not fit into memory.
    """
    known = {own.name: own for own in inputs}
    for name in shapes:
        if inputs and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"{model} has no input {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
                fix=f"Its inputs: {', '.join(known)}.",
            )
    if not inputs and not shapes:
        raise UserError(
            f"the inputs of {model} are not known",
            why="There is no ONNX file beside the engine that tells their shapes.",
            fix="Give each of them, for example --input-shape images=1x3x224x224.",
        )
    wanted = inputs or [Input(name, np.dtype(np.float32), None) for name in shapes]
    sized = [(own, _shape(own, batch, shapes.get(own.name), model)) for own in wanted]
    first = sized[0][1]
    if first and first[0] != batch:
        raise UserError(
            f"{model} does not take batch {batch}",
            why=f"Its batch is fixed at {first[0]}.",
            fix=f"Measure with --batches {first[0]}, or export it with a dynamic batch.",
        )
    _check_memory(sized, model)
    generator = np.random.default_rng(0)
    return {own.name: _noise(generator, shape, own.dtype) for own, shape in sized}


def inputs_of(model: ModelProto, name: str) -> tuple[Input, ...]:
    """The inputs of an ONNX model that have to be fed.

    Raises:
        UserError: one of them is no tensor of numbers.
    """
    return tuple(_input(value, name) for value in graph_inputs(model))


def activation_bytes(graph: ModelProto, feeds: Arrays) -> int:
    """Bytes of the largest tensors that a model makes of these inputs: about what it holds at once, weights apart.

    Sizes that cannot be inferred count as 1: it may hold more.
    """
    sized = copied(graph)
    for value in sized.graph.input:
        if value.name in feeds:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, feeds[value.name].shape))
    for value in sized.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    inferred = inferred_graph(sized)
    return sum(sorted(map(_bytes_of, (*inferred.value_info, *inferred.output)))[-_LARGEST:])


def _bytes_of(value: ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    except KeyError:  # not known
        itemsize = 4
    values: int = math.prod(max(1, size.dim_value) for size in tensor.shape.dim)
    return int(itemsize) * values


def _named_runtimes(names: str) -> Iterator[Runtime]:
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        yield runtime_named(name)


def _of_file(path: Path, label: str, wanted: Sequence[Runtime] | None) -> tuple[list[Target], list[Skipped]]:
    model = load_model(path)
    inputs, precision = inputs_of(model, str(path)), _precision(model)
    here = [own for own in RUNTIMES.values() if own.on_cpu and own.missing_to_run() is None]
    skipped = [] if here or wanted else [Skipped(label, "Neither ONNX Runtime nor OpenVINO works here.")]
    graph = declared_only(model)
    targets = [
        Target(f"{label} {own.name} {precision}", label, path, own, precision, None, inputs, graph, wanted is None)
        for own in (here if wanted is None else wanted)
    ]
    return targets, skipped


def _precision(model: ModelProto) -> str:
    """The precision by which people would call a graph: the narrowest that a matrix product in it runs in."""
    gemms = GraphFacts(model).gemms()
    return next((precision for precision in _NARROW_FIRST if gemms.get(precision)), "fp32")


def _of_engine(path: Path, label: str, folder: Path, engine: Engine, *, optional: bool) -> Target:
    name = f"{label} {engine.runtime} {engine.precision}"
    near = _onnx_near(engine)
    model = None if near is None else load_model(near)
    inputs = () if model is None else inputs_of(model, str(near))
    graph = None if model is None else declared_only(model)
    return Target(name, label, path, runtime_named(engine.runtime), engine.precision, folder, inputs, graph, optional)


def _onnx_near(engine: Engine) -> Path | None:
    """The ONNX file that is the engine, or the one that the run exported: it tells the inputs."""
    folder = engine.folder
    beside = [engine.path, *(parent / "4-export" / folder.name / "model.onnx" for parent in folder.parents[:3])]
    return next((path for path in beside if path.suffix == ".onnx" and path.is_file()), None)


def _of_run(
    run: Path, label: str, wanted: Sequence[Runtime] | None, batches: Sequence[int]
) -> tuple[list[Target], list[Skipped]]:
    targets, skipped = [], []
    stages = [stage for stage in sorted(run.glob("5-engine/*")) if has_final_name(stage)]
    graphs = _current_graphs(run)
    for folder in (record.parent for stage in stages for record in sorted(stage.glob(f"*/{BUILD_RECORD}"))):
        try:
            engine = read_engine(folder)
        except UserError as error:
            skipped.append(Skipped(f"{label} {folder.name}", f"{error.what}. {error.why}"))
            continue
        if wanted is not None and engine.runtime not in {runtime.name for runtime in wanted}:
            continue
        name = f"{label} {folder.name} {engine.runtime} {engine.precision}"
        if (why := _outdated(folder.parent, graphs) or _in_the_way(engine, batches)) is not None:
            skipped.append(Skipped(name, why))
        else:
            targets.append(_of_engine(run, f"{label} {folder.name}", folder, engine, optional=wanted is None))
    if not targets and not skipped:
        of = "" if wanted is None else f" of {', '.join(runtime.name for runtime in wanted)}"
        skipped.append(Skipped(label, f"The run has no engine{of}."))
    return targets, skipped


def _current_graphs(run: Path) -> set[str]:
    """Digests of the exported graphs of a run, and of those that were made of them in other precisions."""
    exported = open_artifact(run / "4-export")
    if exported is None:
        return set()
    made = [open_artifact(stage) for stage in sorted(run.glob("4-precision/*")) if has_final_name(stage)]
    return {
        exported.digest,
        *(own.digest for own in made if own and own.manifest.inputs.get("onnx") == exported.digest),
    }


def _outdated(stage: Path, graphs: set[str]) -> str | None:
    """Why the engines of a stage do not belong to what the run has exported; None when they do."""
    built = open_artifact(stage)
    if built is None:
        return "damaged: its files are not those that its manifest.json lists."
    if built.manifest.inputs.get("onnx") not in graphs:
        return "stale (built from another ONNX). `upvits-deploy engine` builds it again."
    return None


def _in_the_way(engine: Engine, batches: Sequence[int]) -> str | None:
    """Why an engine cannot be measured here; None when nothing is in the way."""
    runtime = runtime_named(engine.runtime)
    if (missing := runtime.missing_to_run()) is not None:
        return missing.why
    if engine.targets and device_here() not in engine.targets:
        return f"It was built for {', '.join(engine.targets)}; this machine has {device_here()}."
    profile = engine.batch
    outside = [batch for batch in batches if not profile.min <= batch <= profile.max]
    if outside and runtime.has_batch_profile:  # the others take every batch
        return f"It takes batches of {profile.min} to {profile.max}, not {', '.join(map(str, outside))}."
    return None


def _unknown(path: Path) -> UserError:
    kinds = f"Name an ONNX file, an engine folder (with {BUILD_RECORD}) or a run directory (with {RECIPE})."
    if not path.exists():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
        return UserError(f"there is no {path}.", why=f"The path does not exist.{hint}", fix=kinds)
    return UserError(f"{path} is nothing that can be measured.", why="It is none of the known kinds.", fix=kinds)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell all of them apart."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UserError("a model was named twice", fix="Name each of them once; every one is measured in many rounds.")
    depth = 1
    while len({own.parts[-depth:] for own in whole}) < len(whole):
        depth += 1
    return ["/".join(own.parts[-depth:]) for own in whole]


def _input(value: ValueInfoProto, model: str) -> Input:
    tensor = value.type.tensor_type
    kinds = (TensorProto.UNDEFINED, TensorProto.STRING, TensorProto.BFLOAT16)
    if not value.type.HasField("tensor_type") or tensor.elem_type in kinds:
        raise UserError(
            f"input {value.name} of {model} cannot be filled with random numbers",
            why="Only tensors of numbers that NumPy has can be made here.",
        )
    sizes = None
    if tensor.HasField("shape"):
        sizes = tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim)
    return Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), sizes)


def _shape(own: Input, batch: int, given: tuple[int, ...] | None, model: str) -> tuple[int, ...]:
    """All sizes of an input: its own, `batch` for an open first axis, and those given for other open ones."""
    sizes = own.sizes
    if sizes is None and given is not None:  # the model does not even say how many axes it has
        sizes = (None,) * len(given)
    written = "?" if sizes is None else "x".join("?" if size is None else str(size) for size in sizes)
    if sizes is None or (given is None and None in sizes[1:]):
        raise UserError(
            f"input {own.name} of {model} has open sizes: {written}",
            why="Only the first axis, the batch, is known from --batches.",
            fix=f"Give them, for example --input-shape {own.name}={written.replace('?', '224')}.",
        )
    wanted = sizes if given is None else given
    pairs = list(zip(sizes, wanted, strict=False))
    if len(wanted) != len(sizes) or any(size not in (None, other) for size, other in pairs):
        raise UserError(
            f"--input-shape {own.name}={'x'.join(map(str, wanted))} does not fit {model}",
            why=f"It has {written}.",
            fix="Give as many sizes as it has; only those marked ? are free.",
        )
    # only the first axis can still be open, or is the user's to follow the batch
    first = batch if sizes[:1] == (None,) else wanted[0] if wanted else None
    return tuple(size for size in (first, *wanted[1:]) if size is not None)


def _check_memory(sized: Sequence[tuple[Input, tuple[int, ...]]], model: str) -> None:
    """Refuse absurd shapes before anything is allocated."""
    wanted = sum(math.prod(shape) * own.dtype.itemsize for own, shape in sized)
    free = psutil.virtual_memory().available
    if wanted > _MEMORY_SHARE * free:
        raise UserError(
            f"the inputs of {model} are too large: {wanted / 2**30:.1f} GiB",
            why=f"This machine has {free / 2**30:.1f} GiB free, and a model needs several times its inputs.",
            fix="Choose a smaller batch or smaller --input-shape.",
        )


def _noise(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
    if dtype.kind == "f":
        return generator.standard_normal(shape, np.float32).astype(dtype)
    if dtype == np.uint8 or dtype.kind == "b":
        return generator.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
    return np.zeros(shape, dtype)  # the only index or token that every table has
