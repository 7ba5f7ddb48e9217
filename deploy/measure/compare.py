"""`upvits-deploy bench`: the latency of any models, measured in turns; the first is what others are held against."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upvits.calib_data.errors import GateError, UserError
from upvits.calib_data.progress import progress_bar
from upvits.deploy.choices import MAX_STREAMS
from upvits.deploy.machine.environment import environment, usable_cores
from upvits.deploy.machine.gpu_monitor import GpuMonitor
from upvits.deploy.measure.bench import (
    BenchSettings,
    LatencyReport,
    interleave_own,
    joules_per_image,
    throughput,
)
from upvits.deploy.measure.compare_targets import Skipped, Target, activation_bytes, find_targets, random_feeds
from upvits.deploy.measure.document import Latency
from upvits.deploy.runtimes import Arrays, BatchProfile, BuildOptions, RunOptions, Session
from upvits.deploy.runtimes.engine_folder import check_built

_MEMORY_SHARE = 0.5  # of what is free, for all sessions
_MOST_THROUGHPUT_SECONDS = 3.0
_SAME_NAMES = (
    "min", "median", "mean", "p90", "p95", "p99", "cv", "unstable", "h2d", "compute", "d2h", "enqueue",
)  # fmt: skip


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ComparedModel(_Document):
    """One model in one runtime; `name` is unique, `label` without the runtime. `session` is what it ran with."""

    name: str
    label: str
    path: str
    runtime: str
    precision: str
    session: dict[str, Any]


class Figure(_Document):
    """One model at one batch size.

    `speedup` is how many times faster than the first model it is: the median over rounds of the ratio of medians
    within a round; `low` and `high` the 10th and 90th percentile over rounds. `rounds_ms` are those medians.
    """

    name: str
    batch: int
    latency: Latency
    drift: float
    speedup: float
    low: float
    high: float
    rounds_ms: list[float]


class StreamFigure(_Document):
    """Images per second of so many sessions of one model at the same time."""

    name: str
    batch: int
    streams: int
    images_per_s: float


class Skip(_Document):
    """An engine that was not measured, and why."""

    name: str
    why: str


class Comparison(_Document):
    """What was compared, on what, and how. Latency in milliseconds per call; inputs are random numbers."""

    format_version: Literal[1] = 1
    reference: str
    models: list[ComparedModel]
    figures: list[Figure]
    throughput: list[StreamFigure]
    skipped: list[Skip]
    warnings: list[str]
    measurement: dict[str, Any]
    gpu: dict[str, Any]
    environment: dict[str, Any]


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
    _check(batches, streams)
    settings = BenchSettings(seconds=seconds)
    models, skipped = find_targets(targets, runtimes, batches)
    # before anything is built or opened: this finds open sizes and absurd ones
    feeds = {own.name: {b: random_feeds(own.inputs, b, input_shapes, own.label) for b in batches} for own in models}
    _check_memory(models, feeds, max(streams))
    options = RunOptions(threads=threads, cuda_graph=cuda_graph)
    with tempfile.TemporaryDirectory(prefix="upvits-bench-") as scratch:
        with ExitStack() as stack:
            opened = _open_all(models, Path(scratch), feeds, options, stack, quiet=quiet)
            models, sessions, folders = opened.models, opened.sessions, opened.folders
            feeds = {own.name: feeds[own.name] for own in models}
            with GpuMonitor() as monitor:
                measured = interleave_own(sessions, feeds, settings, quiet=quiet)
            on_gpu = [own.name for own in models if own.runtime.on_nvidia] if monitor.samples else []
            joules = {(n, b): joules_per_image(sessions[n], feeds[n][b]) for n in on_gpu for b in batches}
        rates = _throughputs(models, folders, feeds, [n for n in streams if n > 1], options, seconds, quiet=quiet)
    return Comparison(
        reference=models[0].name,
        models=[_model(own, measured) for own in models],
        figures=[_figure(measured, models[0].name, own.name, b, joules) for b in batches for own in models],
        throughput=rates,
        skipped=[Skip(name=own.name, why=own.why) for own in (*skipped, *opened.skipped)],
        warnings=[*opened.notes, *measured.warnings()],
        measurement={**asdict(measured.settings), "inputs": "random", "cuda_graph": cuda_graph, "threads": threads},
        gpu=monitor.as_json(),
        environment=environment().as_json(),
    )


def check_output(output: Path, targets: Sequence[Path]) -> None:
    """Refuse a file for the figures that cannot be written, or that is something else already.

    Raises:
        UserError: it is, or lies in, one of the targets, is a folder or a file that holds no comparison, or its
            folder does not exist or cannot be written.
    """
    whole = output.resolve()
    if any(target.resolve() in (whole, *whole.parents) for target in targets):
        raise UserError(
            f"{output} is, or lies in, what is to be measured",
            why="Writing figures there could destroy it.",
            fix="Choose another --output.",
        )
    try:
        if not output.parent.is_dir():
            raise UserError(f"there is no folder {output.parent}", fix="Make it first, or choose another --output.")
        if output.is_dir():
            raise UserError(f"{output} is a folder", fix=f"Name a file, for example --output {output / 'bench.json'}.")
        if output.exists() and not _is_comparison(output):
            raise UserError(
                f"{output} exists and holds no comparison",
                why="Writing the figures there would overwrite something of yours.",
                fix="Choose another --output, or move this file away.",
            )
        # the same kind of draft that is renamed at the end
        with tempfile.NamedTemporaryFile(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent):
            pass
    except OSError as error:
        why = f"The system says: {error.strerror}."
        raise UserError(f"cannot write {output}", why=why, fix="Choose another --output.") from error


def _is_comparison(file: Path) -> bool:
    try:
        Comparison.model_validate_json(file.read_bytes())
    except ValidationError:
        return False
    return True


def comparison_table(found: Comparison) -> RenderableType:
    """Show a comparison on 80 columns."""
    models = {own.name: own for own in found.models}
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 1), header_style="bold")
    table.add_column("model", overflow="fold", min_width=12)
    table.add_column("runtime", overflow="fold")
    table.add_column("type", overflow="fold")
    for name in ("batch", "median ms", "p99 ms", "CV %", "images/s", "faster"):
        table.add_column(name, justify="right")
    for figure in found.figures:
        own, latency = models[figure.name], figure.latency
        table.add_row(
            Text(own.label),
            own.runtime,
            own.precision,
            str(figure.batch),
            _three_digits(latency.median),
            _three_digits(latency.p99),
            f"{100 * latency.cv:.1f}",
            _three_digits(latency.images_per_s),
            "-" if figure.name == found.reference else f"{figure.speedup:.2f}x",
        )
    lines = [f"{own.name}, batch {own.batch}, {own.streams} streams: {own.images_per_s:.0f} images/s"
             for own in found.throughput]  # fmt: skip
    lines += [f"not measured: {own.name}: {own.why}" for own in found.skipped]
    return Group(table, *(Text(line) for line in [*lines, *found.warnings]))


def _check(batches: Sequence[int], streams: Sequence[int]) -> None:
    for what, values in (("batch sizes", batches), ("streams", streams)):
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise UserError(
                f"the {what} {', '.join(map(str, values)) or '(none)'} cannot be measured",
                fix="Give different whole numbers from 1 on, such as 1,8.",
            )
    if max(streams) > MAX_STREAMS:
        raise UserError(f"{max(streams)} streams cannot be measured", fix=f"Use at most {MAX_STREAMS}.")


def _check_memory(models: Sequence[Target], feeds: Mapping[str, Mapping[int, Arrays]], streams: int) -> None:
    """Refuse what would end in the system's killing this process.

    All models are open at the same time, or `streams` sessions of one of them. What is on a GPU is not counted: there
    running out of memory is an error like others.
    """
    needed = {own.name: _bytes_of_calls(own, feeds[own.name]) for own in models}
    largest = max(needed, key=lambda name: needed[name])
    wanted, free = max(sum(needed.values()), streams * needed[largest]), psutil.virtual_memory().available
    if wanted > _MEMORY_SHARE * free:
        raise UserError(
            f"measuring this would take about {wanted / 2**30:.1f} GiB, inputs and activations alone",
            why=f"This machine has {free / 2**30:.1f} GiB free. The most needs {largest}: "
            f"{needed[largest] / 2**30:.1f} GiB in one session.",
            fix="Choose smaller batches, fewer --streams or fewer models.",
        )


def _bytes_of_calls(own: Target, feeds: Mapping[int, Arrays]) -> int:
    """Memory of a session that has run all of its batch sizes: copies of the inputs, and the largest activations."""
    inputs = sum(array.nbytes for arrays in feeds.values() for array in arrays.values())
    if own.graph is None or not own.runtime.on_cpu:
        return inputs
    return inputs + activation_bytes(own.graph, feeds[max(feeds)])


@dataclass(frozen=True, slots=True)
class _Opened:
    """Models that run, their sessions and engine folders by name, those that do not, and what to say of them."""

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
        for number, own in enumerate(progress.track(models, description="building")):
            try:
                folder, notes = (own.folder, []) if own.folder else _build(own, scratch / str(number), feeds[own.name])
                session = _open(own, folder, feeds[own.name], options)
            except UserError as error:
                if not own.optional:
                    raise
                failures.setdefault(own.path, error)
                opened.skipped.append(
                    Skipped(own.name, " ".join(part for part in (f"{error.what}.", error.why) if part))
                )
                continue
            opened.models.append(own)
            opened.sessions[own.name] = stack.enter_context(session)
            opened.folders[own.name] = folder
            opened.notes.extend(notes)
    running = {own.path for own in opened.models}
    for path, failure in failures.items():
        if path not in running:
            raise failure
    return opened


def _build(own: Target, folder: Path, feeds: Mapping[int, Arrays]) -> tuple[Path, list[str]]:
    """Build an ONNX file as it is, and say which of its layers run wider than it asks for."""
    batches = sorted(feeds)
    profile = BatchProfile(batches[0], batches[len(batches) // 2], batches[-1])
    wanted = BuildOptions(precision=own.precision, batch=profile)
    anyhow = replace(wanted, precision="fp32")  # nothing narrower is expected
    try:
        engine = own.runtime.build(own.path, folder, wanted if own.precision in own.runtime.precisions else anyhow)
    except GateError:
        engine = own.runtime.build(own.path, folder, anyhow)
    try:
        check_built(engine.built, wanted, own.runtime)
    except GateError as error:
        return folder, [f"{own.name} runs wider than the file asks for: {error.what}. {error.why}"]
    return folder, []


def _open(own: Target, folder: Path, feeds: Mapping[int, Arrays], options: RunOptions) -> Session:
    session = own.runtime.open(folder, options)
    try:
        for arrays in feeds.values():
            if unknown := [name for name in session.input_names if name not in arrays]:
                raise UserError(
                    f"the sizes of input {unknown[0]} of {own.label} are not known",
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
    wanted = [(own, batch, count) for own in models for batch in feeds[own.name] for count in streams]
    rates = []
    with progress_bar(quiet=quiet) as progress:
        for own, batch, count in progress.track(wanted, description="throughput"):
            # streams share the cores, instead of each taking all of them
            threads = options.threads or max(1, usable_cores() // count)
            opener = partial(own.runtime.open, folders[own.name], replace(options, threads=threads))
            rate = throughput(opener, feeds[own.name][batch], count, min(seconds, _MOST_THROUGHPUT_SECONDS))
            rates.append(StreamFigure(name=own.name, batch=batch, streams=count, images_per_s=rate))
    return rates


def _model(own: Target, measured: LatencyReport) -> ComparedModel:
    return ComparedModel(
        name=own.name,
        label=own.label,
        path=str(own.folder or own.path),
        runtime=own.runtime.name,
        precision=own.precision,
        session=measured.sessions[own.name],
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


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
