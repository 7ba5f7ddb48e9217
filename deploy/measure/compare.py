"""`upvits-deploy bench`: the latency of any models, measured in turns; the first is what others are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from upvits.calib_data.errors import GateError, UserError
from upvits.calib_data.progress import progress_bar
from upvits.deploy.choices import MAX_STREAMS, MAX_THREADS
from upvits.deploy.machine.environment import environment, usable_cores
from upvits.deploy.machine.gpu_monitor import GpuMonitor
from upvits.deploy.measure.bench import (
    BenchSettings,
    LatencyReport,
    interleave,
    joules_per_image,
    throughput,
)
from upvits.deploy.measure.compare_result import ComparedModel, Comparison, Figure, Skip, StreamFigure
from upvits.deploy.measure.compare_targets import Skipped, Target, find_targets
from upvits.deploy.measure.document import Environment, Latency
from upvits.deploy.measure.inputs import activation_bytes, random_feeds
from upvits.deploy.runtimes import Arrays, BatchProfile, BuildOptions, RunOptions, Session
from upvits.deploy.runtimes.engine_folder import check_built
from upvits.deploy.store.drafts import scratch_folder

_MEMORY_SHARE = 0.5  # of what is free, for all sessions
_MOST_THROUGHPUT_SECONDS = 3.0
_SAME_NAMES = (
    "min", "median", "mean", "p90", "p95", "p99", "cv", "unstable", "h2d", "compute", "d2h", "enqueue",
)  # fmt: skip


def compare(
    targets: Sequence[Path],
    *,
    runtimes: str = "auto",
    batches: Sequence[int] = (1,),
    seconds: float = 5.0,
    streams: Sequence[int] = (1,),
    threads: int | None = None,
    cuda_graph: bool = False,
    input_shapes: Mapping[str, tuple[int, ...]] = {},
    quiet: bool = True,
) -> Comparison:
    """Measure models in turns, on random inputs.

    Args:
        targets: ONNX files, engine folders and run directories; the first one's first model that runs is the
            reference.
        runtimes: what ONNX files run on and which engines of runs are taken, names separated by commas; "auto": the
            CPU runtimes that work here, and every engine that does; those that fail are left out, and it is said why.
        batches: images per call.
        seconds: for all models together, per batch size; each throughput takes as long, but 3 s at most.
        streams: sessions at the same time; anything but 1 measures the throughput of so many, too.
        threads: inside operators on CPUs; default: what a model was tuned to.
        cuda_graph: record and replay calls on GPUs.
        input_shapes: sizes by input name, for axes that a model leaves open.
        quiet: no progress bar.

    Raises:
        UserError: a target is missing, broken, does not run here or does not take these inputs, or all of it together
            would not fit into memory.
        BuildError: a runtime that was asked for by name, or every runtime, refuses an ONNX file.
        MissingDependencyError: a runtime that was asked for does not work here.
    """
    _check(batches, streams, threads)
    settings = BenchSettings(seconds=seconds)
    models, skipped = find_targets(targets, runtimes, batches)
    # before anything is built or opened: this finds open sizes and absurd ones
    feeds = {
        target.name: {b: random_feeds(target.inputs, b, input_shapes, target.label) for b in batches}
        for target in models
    }
    _check_memory(models, feeds, max(streams))
    options = RunOptions(threads=threads, cuda_graph=cuda_graph)
    with scratch_folder() as scratch:
        with ExitStack() as stack:
            opened = _open_all(models, scratch, feeds, options, stack, quiet=quiet)
            models, sessions, folders = opened.models, opened.sessions, opened.folders
            feeds = {target.name: feeds[target.name] for target in models}
            with GpuMonitor() as monitor:
                measured = interleave(sessions, feeds, settings, quiet=quiet)
            on_gpu = [target.name for target in models if target.runtime.on_nvidia] if monitor.samples else []
            joules = {(n, b): joules_per_image(sessions[n], feeds[n][b]) for n in on_gpu for b in batches}
        rates = _throughputs(models, folders, feeds, [n for n in streams if n > 1], options, seconds, quiet=quiet)
    return Comparison(
        reference=models[0].name,
        models=[_model(target, measured) for target in models],
        figures=[_figure(measured, models[0].name, target.name, b, joules) for b in batches for target in models],
        throughput=rates,
        skipped=[Skip(name=target.name, why=target.why) for target in (*skipped, *opened.skipped)],
        warnings=[*opened.notes, *measured.warnings()],
        measurement={**asdict(measured.settings), "inputs": "random", "cuda_graph": cuda_graph, "threads": threads},
        gpu=monitor.as_json(),
        environment=Environment.model_validate(environment().as_json()),
    )


def _check(batches: Sequence[int], streams: Sequence[int], threads: int | None) -> None:
    for what, values in (("batch sizes", batches), ("streams", streams)):
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise UserError(
                f"the {what} {', '.join(map(str, values)) or '(none)'} cannot be measured",
                fix="Give different whole numbers from 1 on, such as 1,8.",
            )
    if max(streams) > MAX_STREAMS:
        raise UserError(f"{max(streams)} streams cannot be measured", fix=f"Use at most {MAX_STREAMS}.")
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UserError(f"a session cannot have {threads} threads", fix=f"Use 1 to {MAX_THREADS}.")


def _check_memory(models: Sequence[Target], feeds: Mapping[str, Mapping[int, Arrays]], streams: int) -> None:
    """Refuse what would end in the system's killing this process.

    All models are open at the same time, or `streams` sessions of one of them. What is on a GPU is not counted:
    running out of GPU memory is an ordinary error.
    """
    needed = {target.name: _bytes_of_calls(target, feeds[target.name]) for target in models}
    largest = max(needed, key=lambda name: needed[name])
    total, free = max(sum(needed.values()), streams * needed[largest]), psutil.virtual_memory().available
    if total > _MEMORY_SHARE * free:
        raise UserError(
            f"measuring this would take about {total / 2**30:.1f} GiB, inputs and activations alone",
            why=f"This machine has {free / 2**30:.1f} GiB free. The most needs {largest}: "
            f"{needed[largest] / 2**30:.1f} GiB in one session.",
            fix="Choose smaller batches, fewer --streams or fewer models.",
        )


def _bytes_of_calls(target: Target, feeds: Mapping[int, Arrays]) -> int:
    """Memory of a session that has run all of its batch sizes: copies of the inputs, and the largest activations."""
    inputs = sum(array.nbytes for arrays in feeds.values() for array in arrays.values())
    if target.graph is None or not target.runtime.on_cpu:
        return inputs
    return inputs + activation_bytes(target.graph, feeds[max(feeds)])


@dataclass(frozen=True, slots=True)
class _Opened:
    """Models that run, their sessions and engine folders by name; models that do not run; notes for the user."""

    models: list[Target]
    sessions: dict[str, Session]
    folders: dict[str, Path]
    skipped: list[Skipped]
    notes: list[str]


def _open_all(
    models: Sequence[Target],
    scratch: Path,
    feeds: Mapping[str, Mapping[int, Arrays]],
    options: RunOptions,
    stack: ExitStack,
    *,
    quiet: bool,
) -> _Opened:
    """Build what is no engine yet into `scratch`, open everything, and run it once at every batch size.

    Raises:
        UserError: a model that may not be left out does not work, or nothing of what was named does.
    """
    opened = _Opened([], {}, {}, [], [])
    failures: dict[Path, UserError] = {}
    with progress_bar(quiet=quiet) as progress:
        for number, target in enumerate(progress.track(models, description="building")):
            try:
                folder, notes = (
                    (target.folder, []) if target.folder else _build(target, scratch / str(number), feeds[target.name])
                )
                session = _open(target, folder, feeds[target.name], options)
            except UserError as error:
                if not target.optional:
                    raise
                failures.setdefault(target.path, error)
                opened.skipped.append(
                    Skipped(target.name, " ".join(part for part in (f"{error.what}.", error.why) if part))
                )
                continue
            opened.models.append(target)
            opened.sessions[target.name] = stack.enter_context(session)
            opened.folders[target.name] = folder
            opened.notes.extend(notes)
    running = {target.path for target in opened.models}
    for path, failure in failures.items():
        if path not in running:
            raise failure
    return opened


def _build(target: Target, folder: Path, feeds: Mapping[int, Arrays]) -> tuple[Path, list[str]]:
    """Build an ONNX file as it is, and say which of its layers run wider than it asks for."""
    batches = sorted(feeds)
    profile = BatchProfile(batches[0], batches[len(batches) // 2], batches[-1])
    options = BuildOptions(precision=target.precision, batch=profile)
    fallback = replace(options, precision="fp32")  # nothing narrower is expected
    try:
        engine = target.runtime.build(
            target.path, folder, options if target.precision in target.runtime.precisions else fallback
        )
    except GateError:
        engine = target.runtime.build(target.path, folder, fallback)
    try:
        check_built(engine.built, options, target.runtime)
    except GateError as error:
        return folder, [f"{target.name} runs wider than the file asks for: {error.what}. {error.why}"]
    return folder, []


def _open(target: Target, folder: Path, feeds: Mapping[int, Arrays], options: RunOptions) -> Session:
    session = target.runtime.open(folder, options)
    try:
        for arrays in feeds.values():
            if unknown := [name for name in session.input_names if name not in arrays]:
                raise UserError(
                    f"the sizes of input {unknown[0]} of {target.label} are not known",
                    fix=f"Give them, for example --input-shape {unknown[0]}=1x3x224x224.",
                )
            session.time(arrays, 1)
    except BaseException:
        session.close()
        raise
    return session


def _throughputs(
    models: Sequence[Target],
    folders: Mapping[str, Path],
    feeds: Mapping[str, Mapping[int, Arrays]],
    streams: Sequence[int],
    options: RunOptions,
    seconds: float,
    *,
    quiet: bool,
) -> list[StreamFigure]:
    cases = [(target, batch, count) for target in models for batch in feeds[target.name] for count in streams]
    rates = []
    with progress_bar(quiet=quiet) as progress:
        for target, batch, count in progress.track(cases, description="throughput"):
            # streams share the cores, instead of each taking all of them
            threads = options.threads or max(1, usable_cores() // count)
            opener = partial(target.runtime.open, folders[target.name], replace(options, threads=threads))
            rate = throughput(opener, feeds[target.name][batch], count, min(seconds, _MOST_THROUGHPUT_SECONDS))
            rates.append(StreamFigure(name=target.name, batch=batch, streams=count, images_per_s=rate))
    return rates


def _model(target: Target, measured: LatencyReport) -> ComparedModel:
    return ComparedModel(
        name=target.name,
        label=target.label,
        path=str(target.folder or target.path),
        runtime=target.runtime.name,
        precision=target.precision,
        session=measured.sessions[target.name],
    )


def _figure(
    measured: LatencyReport, reference: str, name: str, batch: int, joules: Mapping[tuple[str, int], float | None]
) -> Figure:
    stats, ratio = measured.stats[name][batch], measured.ratio(reference, name, batch)
    threads = measured.sessions[name].get("intra_op_threads")
    latency = Latency(
        **{part: getattr(stats, part) for part in _SAME_NAMES},
        images_per_s=stats.images_per_second,
        n=stats.iterations,
        quantiles=list(stats.quantiles),
        threads=None if threads is None else int(threads),
        joules_per_image=joules.get((name, batch)),
    )
    return Figure(
        name=name,
        batch=batch,
        latency=latency,
        drift=stats.drift,
        speedup=ratio.median,
        low=ratio.low,
        high=ratio.high,
        rounds_ms=list(measured.rounds[name][batch]),
    )
