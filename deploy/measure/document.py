"""What was measured, as it goes into latency.json and report.json.

Units: latency in milliseconds, memory in MB (10**6 bytes), time in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _batch(key: object) -> object:
    return int(key[1:]) if isinstance(key, str) and key[:1] == "b" and key[1:].isdecimal() else key


BatchSize: TypeAlias = Annotated[int, BeforeValidator(_batch), PlainSerializer(lambda batch: f"b{batch}")]
"""Images per call; "b8" in JSON, where keys are strings."""


class Latency(_Document):
    """One timed model at one batch size, in ms per batch, host to host.

    `cv` is standard deviation over mean, `n` the number of calls, `threads` what the CPU session ran with.
    `quantiles` are the 0th to 100th percentile in steps of 2 (51 values), enough to draw the distribution. `h2d`,
    `compute`, `d2h` and `enqueue` are medians of the parts of a call, on a GPU. `unstable`: cv above 2.5 %.
    `joules_per_image` is measured by NVML.
    """

    min: float
    median: float
    mean: float
    p90: float
    p95: float
    p99: float
    cv: float
    images_per_s: float
    n: int
    unstable: bool
    quantiles: list[float] = []
    threads: int | None = None
    h2d: float | None = None
    compute: float | None = None
    d2h: float | None = None
    enqueue: float | None = None
    joules_per_image: float | None = None


# runtime -> precision -> batch size -> value
Latencies: TypeAlias = dict[str, dict[str, dict[BatchSize, Latency]]]
Speedups: TypeAlias = dict[str, dict[str, dict[BatchSize, float]]]


class Throughput(_Document):
    """Images per second of several sessions that run at the same time."""

    model: Literal["dense", "pruned"]
    runtime: str
    precision: str
    batch: int
    streams: int
    images_per_s: float


class Best(_Document):
    """What to deploy on a runtime: the fastest precision of the pruned model within the allowed loss of accuracy.

    `speedup` is against the dense model in fp32 (or in the widest precision that was measured), measured
    in the same rounds. `passed_over` says for every other precision why it was not chosen.
    """

    runtime: str
    precision: str
    batch: int
    dense_precision: str
    dense_ms: float
    pruned_ms: float
    speedup: float
    low: float
    high: float
    passed_over: dict[str, str] = {}


class Layer(_Document):
    """One layer and its time in both models, in ms per batch; None where a model has no such layer."""

    name: str
    op: str
    dense_ms: float | None
    pruned_ms: float | None


class LayerTimes(_Document):
    """Per-layer times in one runtime and precision, in order of execution, by the runtime's profiler."""

    runtime: str
    precision: str
    batch: int
    layers: list[Layer]


class Finding(_Document):
    """Why latency fell less than the MACs did: what was seen, and the setting that would change it."""

    cause: str
    evidence: str
    advice: str


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
    gpu: dict[str, Any] = {}
