"""What `upvits-deploy bench` measures: ONNX files, engine folders and runs, ours or not, and inputs for them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.graphs.files import declared_only, load_model
from upvits.deploy.measure.inputs import Input, inputs_of
from upvits.deploy.runtimes import BUILD_RECORD, RUNTIMES, Engine, Runtime, read_engine, runtime_named
from upvits.deploy.runtimes.engine_folder import require
from upvits.deploy.runtimes.nvinfer import device_here
from upvits.deploy.store.artifacts import has_final_name, open_artifact
from upvits.deploy.store.run_dir import RECIPE

_NARROW_FIRST = ("fp8", "int8", "fp16", "bf16")


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
    chosen = None if runtimes.strip().lower() == "auto" else tuple(_named_runtimes(runtimes))
    paths = [user_path(path) for path in paths]
    labels = _short_names(paths)
    targets: list[Target] = []
    skipped: list[Skipped] = []
    for path, label in zip(paths, labels, strict=True):
        if path.is_file() and path.suffix == ".onnx":
            ready, left_out = _of_file(path, label, chosen)
            targets += ready
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
            ready, left_out = _of_run(path, label, chosen, batches)
            targets += ready
            skipped += left_out
        else:
            raise _unknown(path)
    if not targets:
        why = "; ".join(f"{skip.name}: {skip.why}" for skip in skipped) or "Nothing was named."
        raise UserError("nothing to measure", why=why, fix="Name ONNX files, engine folders or runs with engines.")
    return targets, skipped


def _named_runtimes(names: str) -> Iterator[Runtime]:
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        yield runtime_named(name)


def _of_file(path: Path, label: str, chosen: Sequence[Runtime] | None) -> tuple[list[Target], list[Skipped]]:
    model = load_model(path)
    inputs, precision = inputs_of(model, str(path)), _precision(model)
    here = [runtime for runtime in RUNTIMES.values() if runtime.on_cpu and runtime.missing_to_run() is None]
    skipped = [] if here or chosen else [Skipped(label, "Neither ONNX Runtime nor OpenVINO works here.")]
    graph = declared_only(model)
    targets = [
        Target(
            f"{label} {runtime.name} {precision}", label, path, runtime, precision, None, inputs, graph, chosen is None
        )
        for runtime in (here if chosen is None else chosen)
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
    run: Path, label: str, chosen: Sequence[Runtime] | None, batches: Sequence[int]
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
        if chosen is not None and engine.runtime not in {runtime.name for runtime in chosen}:
            continue
        name = f"{label} {folder.name} {engine.runtime} {engine.precision}"
        if (why := _outdated(folder.parent, graphs) or _in_the_way(engine, batches)) is not None:
            skipped.append(Skipped(name, why))
        else:
            targets.append(_of_engine(run, f"{label} {folder.name}", folder, engine, optional=chosen is None))
    if not targets and not skipped:
        of = "" if chosen is None else f" of {', '.join(runtime.name for runtime in chosen)}"
        skipped.append(Skipped(label, f"The run has no engine{of}."))
    return targets, skipped


def _current_graphs(run: Path) -> set[str]:
    """Digests of the exported graphs of a run, and of those that were made of them in other precisions."""
    exported = open_artifact(run / "4-export")
    if exported is None:
        return set()
    derived = [open_artifact(stage) for stage in sorted(run.glob("4-precision/*")) if has_final_name(stage)]
    return {
        exported.digest,
        *(
            artifact.digest
            for artifact in derived
            if artifact and artifact.manifest.inputs.get("onnx") == exported.digest
        ),
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
        raise UserError("a model was named twice", fix="Name each model once; it is measured in many rounds anyway.")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in whole]
