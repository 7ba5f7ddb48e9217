"""What was measured, as it goes into latency.json and report.json.

Units: latency in milliseconds, memory in MB (10**6 bytes), time in seconds.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from upvits.calib_data.documents import Count, Facts, Name, Natural, Number, Positive, Text


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _batch(key: object) -> object:
    return int(key[1:]) if isinstance(key, str) and key[:1] == "b" and key[1:].isdecimal() else key


BatchSize: TypeAlias = Annotated[Natural, BeforeValidator(_batch), PlainSerializer(lambda batch: f"b{batch}")]
"""Images per call; "b8" in JSON, where keys are strings."""


def _ascending(values: list[float]) -> list[float]:
    if any(one > other for one, other in pairwise(values)):
        raise ValueError("quantiles are not in ascending order")
    return values


class Latency(_Document):
    """One timed model at one batch size, in ms per batch, host to host.

    `cv` is standard deviation over mean, `n` the number of calls, `threads` what the CPU session ran with.
    `quantiles` are the 0th to 100th percentile in steps of 2 (51 values), enough to draw the distribution. `h2d`,
    `compute`, `d2h` and `enqueue` are medians of the parts of a call, on a GPU. `unstable`: cv above 2.5 %.
    `joules_per_image` is measured by NVML.
    """

    min: Positive
    median: Positive
    mean: Positive
    p90: Positive
    p95: Positive
    p99: Positive
    cv: Number
    images_per_s: Positive
    n: Count
    unstable: bool
    quantiles: Annotated[list[Positive], AfterValidator(_ascending)] = []
    threads: Count | None = None
    h2d: Number | None = None
    compute: Number | None = None
    d2h: Number | None = None
    enqueue: Number | None = None
    joules_per_image: Number | None = None


# runtime -> precision -> batch size -> value
Latencies: TypeAlias = dict[Name, dict[Name, dict[BatchSize, Latency]]]
Speedups: TypeAlias = dict[Name, dict[Name, dict[BatchSize, Positive]]]


class Throughput(_Document):
    """Images per second of several sessions that run at the same time."""

    model: Literal["dense", "pruned"]
    runtime: Name
    precision: Name
    batch: Natural
    streams: Natural
    images_per_s: Positive


class Best(_Document):
    """What to deploy on a runtime: the fastest precision of the pruned model within the allowed loss of accuracy.

    `speedup` is against the dense model in fp32 (or in the widest precision that was measured), measured
    in the same rounds. `passed_over` says for every other precision why it was not chosen.
    """

    runtime: Name
    precision: Name
    batch: Natural
    dense_precision: Name
    dense_ms: Positive
    pruned_ms: Positive
    speedup: Positive
    low: Positive
    high: Positive
    passed_over: dict[Name, Text] = {}


class Layer(_Document):
    """One layer and its time in both models, in ms per batch; None where a model has no such layer."""

    name: Name
    op: Name
    dense_ms: Number | None
    pruned_ms: Number | None


class LayerTimes(_Document):
    """Per-layer times in one runtime and precision, in order of execution, by the runtime's profiler."""

    runtime: Name
    precision: Name
    batch: Natural
    layers: list[Layer]


class Finding(_Document):
    """Why latency fell less than the MACs did: what was seen, and the setting that would change it."""

    cause: Text
    evidence: Text
    advice: Text


class Gpu(_Document):
    """A GPU of the machine."""

    name: Name
    memory_gib: Number | None = None  # of some it is not known


class Environment(_Document):
    """The machine and the libraries; see `deploy.machine.environment`. `gpu` names the GPUs together."""

    version: Name = ""
    python: Name = ""
    system: Name = ""
    cpu: Name = ""
    cores_usable: Count | None = None
    load_average: Number | None = None
    memory_gib: Number | None = None
    gpus: list[Gpu] = []
    driver: Name | None = None
    libraries: dict[Name, Name] = {}
    gpu: Name | None = None


class Bench(_Document):
    """Latencies of both models and how many times faster the pruned one is, as they go into the report.

    `speedup` is the median over rounds of the ratio of medians within a round, `speedup_low` and `speedup_high` the
    10th and 90th percentile over rounds.
    """

    dense: Latencies = {}
    pruned: Latencies = {}
    speedup: Speedups = {}
    speedup_low: Speedups = {}
    speedup_high: Speedups = {}
    throughput: list[Throughput] = []
    best: list[Best] = []
    layer_times: list[LayerTimes] = []
    findings: list[Finding] = []
    gpu: Facts = {}
