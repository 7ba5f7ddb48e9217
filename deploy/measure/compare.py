"""`upvits-deploy bench`: the latency of any models, measured in turns; the first is what others are held against."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console, Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from calib_data.errors import UserError
from deploy.environment import environment, usable_cores
from deploy.measure.bench import BenchSettings, LatencyReport, interleave_own, joules_per_image, throughput
from deploy.measure.compare_targets import Target, find_targets, random_feeds
from deploy.measure.gpu_monitor import GpuMonitor
from deploy.report.document import Latency
from deploy.runtimes import Arrays, BatchProfile, BuildOptions, RunOptions

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
        targets: ONNX files, engine folders and run directories; the first one's first model is the reference.
        runtimes: what ONNX files run on and which engines of runs are taken, names separated by commas; "auto": the
            CPU runtimes that work here, and every engine that does.
        batches: images per call.
        seconds: for all models together, per batch size; each throughput takes as long, but 3 s at most.
        streams: sessions at the same time; anything but 1 measures the throughput of so many, too.
        threads: inside operators on CPUs; default: what a model was tuned to.
        cuda_graph: record and replay calls on GPUs.
        input_shapes: sizes by input name, for axes that a model leaves open.
        quiet: no progress bar.

    Raises:
        UserError: a target is missing, broken, does not run here or does not take these inputs.
        BuildError: a runtime refuses an ONNX file.
        MissingDependencyError: a runtime that was asked for does not work here.
    """
    _check(batches, streams)
    models, skipped = find_targets(targets, runtimes, batches)
    # before anything is built or opened: this finds open sizes and absurd ones
    feeds = {own.name: {b: random_feeds(own.inputs, b, input_shapes, own.label) for b in batches} for own in models}
    options = RunOptions(threads=threads, cuda_graph=cuda_graph)
    with tempfile.TemporaryDirectory(prefix="upvits-bench-") as scratch:
        folders = _engine_folders(models, Path(scratch), batches, quiet=quiet)
        with ExitStack() as stack:
            sessions = {own.name: stack.enter_context(own.runtime.open(folders[own.name], options)) for own in models}
            with GpuMonitor() as monitor:
                measured = interleave_own(sessions, feeds, BenchSettings(seconds=seconds), quiet=quiet)
            on_gpu = [own.name for own in models if own.runtime.rest == "fp16"] if monitor.samples else []
            joules = {(n, b): joules_per_image(sessions[n], feeds[n][b]) for n in on_gpu for b in batches}
        rates = _throughputs(models, folders, feeds, [n for n in streams if n > 1], options, seconds, quiet=quiet)
    return Comparison(
        reference=models[0].name,
        models=[_model(own, measured) for own in models],
        figures=[_figure(measured, models[0].name, own.name, b, joules) for b in batches for own in models],
        throughput=rates,
        skipped=[Skip(name=own.name, why=own.why) for own in skipped],
        warnings=measured.warnings(),
        measurement={**asdict(measured.settings), "inputs": "random", "cuda_graph": cuda_graph, "threads": threads},
        gpu=monitor.as_json(),
        environment=environment().as_json(),
    )


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


def _engine_folders(models: Sequence[Target], scratch: Path, batches: Sequence[int], *, quiet: bool) -> dict[str, Path]:
    """Engine folders by name; ONNX files are built into `scratch`, in the precision that they have."""
    ordered = sorted(batches)
    profile = BatchProfile(ordered[0], ordered[len(ordered) // 2], ordered[-1])
    folders = {}
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        for number, own in enumerate(progress.track(models, description="building")):
            if own.folder is not None:
                folders[own.name] = own.folder
                continue
            folders[own.name] = scratch / str(number)
            own.runtime.build(own.path, scratch / str(number), BuildOptions(precision=own.precision, batch=profile))
    return folders


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
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
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
