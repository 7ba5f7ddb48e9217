"""How many threads are worth their cores, for runtimes on CPUs."""

import time
from collections.abc import Callable, Mapping

import numpy as np
from onnx import ModelProto, helper

from upvits.deploy.graphs.nodes import graph_inputs
from upvits.deploy.runtimes.interface import Arrays, Session

_TUNING_SECONDS = 3.0
_WORTHWHILE = 0.7  # parallel efficiency


def worthwhile_threads(open_session: Callable[[int], Session], feeds: Arrays | None, cores: int) -> int:
    """How many threads are worth their cores for a model on this CPU: 1, half of the cores or all, timed in turns.

    More threads are taken only where each of them still does at least 70 % of what it could: narrow layers are over
    before another thread has woken up, and two cores of a virtual machine may share a real core. PVTv2-B0 at 64
    pixels, batch 8, with ONNX Runtime on such a machine: 19.2 ms with 1 thread and 15.4 with 2, but half as wide
    8.9 and 9.1. Cores that are not worth it serve more by running a second session; and timings on 1 thread spread
    less.

    Args:
        open_session: opens the model with so many threads.
        feeds: inputs of a call; None when they cannot be made up, and then all cores are taken.
        cores: that this process may use.
    """
    counts = sorted({1, max(1, cores // 2), cores})
    if len(counts) == 1 or feeds is None:
        return cores
    sessions = {count: open_session(count) for count in counts}
    times: dict[int, list[float]] = {count: [] for count in sessions}
    started = time.perf_counter()
    while len(times[1]) < 4 or (len(times[1]) < 60 and time.perf_counter() - started < _TUNING_SECONDS):
        for count, session in sessions.items():
            times[count].extend(session.time(feeds, 1).total)
    for session in sessions.values():
        session.close()
    return _best({count: float(np.median(seconds[1:])) for count, seconds in times.items()})  # the first call warms up


def random_feeds(model: ModelProto, batch: int) -> Arrays | None:
    """Random inputs for a call; None when an axis other than the first is dynamic."""
    feeds = {}
    generator = np.random.default_rng(0)
    for value in graph_inputs(model):
        tensor = value.type.tensor_type
        sizes = [dim.dim_value for dim in tensor.shape.dim]
        if 0 in sizes[1:]:
            return None
        noise = generator.random([sizes[0] or batch, *sizes[1:]] if sizes else [], np.float32)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[value.name] = (255 * noise if dtype == np.uint8 else noise).astype(dtype)
    return feeds


def _best(medians: Mapping[int, float]) -> int:
    best = 1
    for count in medians:
        if medians[best] / medians[count] >= _WORTHWHILE * count / best:
            best = count
    return best
