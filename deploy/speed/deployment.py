"""Where a network will run, and timing networks there: latency depends on shapes alone, so weights are random."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from upvits.calib_data import Preprocess
from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.graphs.files import load_model, save_model
from upvits.deploy.machine.environment import builder_facts
from upvits.deploy.measure.bench import BenchSettings, LatencyReport, interleave
from upvits.deploy.precision import QUANTIZED, calibrate, convert
from upvits.deploy.runtimes import Arrays, BatchProfile, BuildOptions, RunOptions, Runtime, Session
from upvits.deploy.runtimes.interface import Floats
from upvits.deploy.runtimes.threads import random_feeds
from upvits.deploy.store.drafts import scratch_folder

MEASURING = BenchSettings(seconds=2.0, warmup_seconds=0.1, rounds=10, min_iterations=20)


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where a network will run.

    Attributes:
        runtime: what it is built for, and timed with.
        precision: of the engine.
        batch: images per call.
        profile: batch sizes that engines are built for.
        opset, uint8_input: as the network will be exported.
        cuda_graph: replay recorded work on GPUs.
    """

    runtime: Runtime
    precision: str
    batch: int = 1
    profile: BatchProfile = field(default_factory=BatchProfile)
    opset: int = 20
    uint8_input: bool = False
    cuda_graph: bool = False

    def facts(self) -> dict[str, str]:
        """All that latencies depend on beside the network: the machine, the runtime's version, and how it is built."""
        return {
            **builder_facts(self.runtime.libraries, on_cpu=self.runtime.on_cpu),
            "runtime": self.runtime.name,
            "precision": self.precision,
            "batch": f"{self.batch} of {self.profile}",
            "export": f"opset {self.opset}, uint8 {self.uint8_input}, graph {self.cuda_graph}",
        }


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The dense network where it will run: what everything else is timed in turns with.

    Attributes:
        model: on the CPU.
        preprocess: its input.
        deployment: where it runs; `check_deployment` has passed.
        session: it, built and open.
        ms: a call of it, in milliseconds.
    """

    model: nn.Module
    preprocess: Preprocess
    deployment: Deployment
    session: Session
    ms: float


@contextmanager
def opened_baseline(model: nn.Module, preprocess: Preprocess, deployment: Deployment) -> Iterator[Baseline]:
    """Build, open and time the dense network."""
    with opened(deployment, {"dense": (model, preprocess)}) as sessions:
        report = measure(sessions, {"dense": preprocess.input_size}, deployment)
        yield Baseline(model, preprocess, deployment, sessions["dense"], report.stats["dense"][deployment.batch].median)


def check_deployment(deployment: Deployment) -> None:
    """Refuse what cannot be timed here, before anything is computed.

    Raises:
        UserError: the runtime does not run here, lacks the precision, or its engines leave out the batch size.
    """
    runtime = deployment.runtime
    missing = runtime.missing_to_build() or runtime.missing_to_run()
    if missing is not None:
        raise UserError(
            f"A latency target for {runtime.name} cannot be met here: it does not run on this machine.",
            why=f"{missing.why} Latency is measured where the network will run.",
            fix=f"{missing.fix} Or name a runtime that runs here, or give --ratio or --target-macs instead.",
        )
    if deployment.precision not in runtime.precisions:
        raise UserError(
            f"{runtime.name} has no {deployment.precision}.", fix=f"Choose from {', '.join(runtime.precisions)}."
        )
    profile = deployment.profile
    if not profile.min <= deployment.batch <= profile.max:
        raise UserError(
            f"Latency is wanted at batch {deployment.batch}, but engines are built for {profile.min} to {profile.max}.",
            fix="Widen --batch-profile, or choose another batch size.",
        )


@contextmanager
def opened(
    deployment: Deployment, networks: Mapping[str, tuple[nn.Module, Preprocess]], threads: int | None = None
) -> Iterator[dict[str, Session]]:
    """Build every network with the runtime and open it.

    Args:
        deployment: where they run.
        networks: by name, each with the size of what it takes (mean and std are not used).
        threads: of CPU sessions; None takes what each engine is tuned to.
    """
    with scratch_folder() as scratch, ExitStack() as stack:
        sessions = {}
        for number, (name, (model, preprocess)) in enumerate(networks.items()):
            folder = scratch / str(number)
            _build(deployment, model, preprocess, folder)
            options = RunOptions(threads=threads, cuda_graph=deployment.cuda_graph)
            sessions[name] = stack.enter_context(deployment.runtime.open(folder / "engine", options))
        yield sessions


def _build(deployment: Deployment, model: nn.Module, preprocess: Preprocess, folder: Path) -> None:
    path = folder / "model.onnx"
    folder.mkdir()
    (folder / "engine").mkdir()
    uint8 = deployment.uint8_input and preprocess.input_size[0] == 3
    export_onnx(model, path, preprocess, opset=deployment.opset, uint8_input=uint8)
    if deployment.precision != "fp32":
        graph, ranges = load_model(path), None
        if deployment.precision in QUANTIZED:
            feeds = random_feeds(graph, 2)
            assert feeds is not None
            ranges = calibrate(graph, list(feeds.values()), quiet=True)
        converted = convert(
            graph, deployment.precision, ranges=ranges, base_precision=deployment.runtime.base_precision
        )
        save_model(converted.model, path)
    options = BuildOptions(precision=deployment.precision, batch=deployment.profile)
    deployment.runtime.build(path, folder / "engine", options)


def measure(
    sessions: Mapping[str, Session],
    sizes: Mapping[str, tuple[int, int, int]],
    deployment: Deployment,
    settings: BenchSettings = MEASURING,
) -> LatencyReport:
    """Time whole networks in turns, as the bench stage does, at the batch of the deployment."""
    return interleave(sessions, _feeds(sessions, sizes, deployment), settings)


def shares(
    sessions: Mapping[str, Session],
    sizes: Mapping[str, tuple[int, int, int]],
    deployment: Deployment,
    *,
    seconds: float = 0.02,
    rounds: int = 12,
) -> dict[str, Floats]:
    """Time of graphs of any length in shares of the first one's, [rounds] each.

    Each takes its turn for about `seconds` in every round and counts with its mean: on a busy machine a short call
    slips between the turns of other processes, which a long one never does, and medians of calls would make long ones
    look too slow.
    """
    feeds = {name: by_batch[deployment.batch] for name, by_batch in _feeds(sessions, sizes, deployment).items()}
    calls = {}
    for name, session in sessions.items():
        session.time(feeds[name], 2)
        calls[name] = max(2, math.ceil(seconds / max(float(np.median(session.time(feeds[name], 5).total)), 1e-6)))
    means: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(rounds):
        for name in list(sessions)[:: 1 if number % 2 == 0 else -1]:
            sessions[name].time(feeds[name], 1)
            means[name].append(float(sessions[name].time(feeds[name], calls[name]).total.mean()))
    reference = np.array(next(iter(means.values())))
    return {name: np.array(times) / reference for name, times in means.items()}


def _feeds(
    sessions: Mapping[str, Session], sizes: Mapping[str, tuple[int, int, int]], deployment: Deployment
) -> dict[str, dict[int, Arrays]]:
    return {
        name: {deployment.batch: {session.input_names[0]: _random_input(sizes[name], deployment)}}
        for name, session in sessions.items()
    }


def _random_input(size: tuple[int, int, int], deployment: Deployment) -> np.ndarray[Any, np.dtype[Any]]:
    generator = np.random.default_rng(0)
    if deployment.uint8_input and size[0] == 3:
        return generator.integers(0, 256, (deployment.batch, *size[1:], 3), np.uint8)
    return generator.standard_normal((deployment.batch, *size), np.float32)


def with_random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network on the meta device weights of its own: small ones, so that nothing overflows."""
    made = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.02, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(1)
    return made


@functools.cache
def stream_preprocess(size: tuple[int, int, int]) -> Preprocess:
    """Stands in for preprocessing where a graph takes features of this size."""
    return Preprocess(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")
