"""PyTorch as one more session to measure: eager or compiled, in a precision, with or without a CUDA graph.

The times of its calls mean the same as those of `deploy.runtimes`: host to host, with the parts on the device apart.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from upvits.deploy.runtimes.interface import Arrays, CallTimes, LayerTime

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PARTS = ("h2d", "compute", "d2h")


@dataclass(frozen=True, slots=True)
class TorchWay:
    """How to run a network in PyTorch.

    Attributes:
        precision: "fp32" (no TF32), "fp16" or "bf16": weights, activations and the input are cast.
        compiled: by torch.compile, for one batch size.
        channels_last: memory format of convolutions.
        cuda_graph: record the work of a call once and replay it.
    """

    precision: str
    compiled: bool = False
    channels_last: bool = False
    cuda_graph: bool = False

    def __str__(self) -> str:
        extras = [" channels-last"] * self.channels_last + [" CUDA graph"] * self.cuda_graph
        return f"PyTorch {'compile' if self.compiled else 'eager'} {self.precision}{''.join(extras)}"


class TorchSession:
    """A copy of a network on a device; implements `deploy.runtimes.Session` for one input and one output."""

    input_names = ("images",)
    output_names = ("logits",)

    def __init__(self, model: nn.Module, way: TorchWay, device: str) -> None:
        torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]  # fp32 means fp32: convolutions would multiply in TF32
        self._way, self._device = way, torch.device(device)
        self.on_gpu = self._cuda = self._device.type == "cuda"
        self._format = torch.channels_last if way.channels_last else torch.contiguous_format
        network = copy.deepcopy(model).eval().requires_grad_(False)
        network = network.to(self._device, _DTYPES[way.precision]).to(memory_format=self._format)
        if way.compiled:
            # Networks share code, and every batch size is compiled; at the limit of 8 it would quietly go on eagerly.
            torch._dynamo.config.recompile_limit = 64
        self._network: Any = torch.compile(network, dynamic=False, fullgraph=True) if way.compiled else network
        self._bound: tuple[int, ...] | None = None
        self._host = self._input = self._output = self._answer = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.settings: Mapping[str, str | int | bool] = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self._device) if self._cuda else "cpu",
            "tf32": False,
            "input": way.precision,
        }

    @torch.inference_mode()
    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        self._bind(feeds["images"])
        self._input.copy_(self._host)
        self._compute()
        return {"logits": self._output.float().cpu().numpy()}

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        self._bind(feeds["images"])
        total, enqueue = np.empty(calls), np.empty(calls)
        marks = [[self._mark() for _ in range(4)] for _ in range(calls)] if self._cuda else []
        for index in range(calls):
            started = time.perf_counter()
            if not self._cuda:  # host and device are one
                self._compute()
            else:
                enqueue[index] = self._submit(marks[index])
                torch.cuda.synchronize(self._device)
            total[index] = time.perf_counter() - started
        if not self._cuda:
            return CallTimes(total)
        parts = {
            name: np.array([mark[i].elapsed_time(mark[i + 1]) * 1e-3 for mark in marks])
            for i, name in enumerate(_PARTS)
        }
        return CallTimes(total, enqueue=enqueue, **parts)

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[LayerTime, ...]:
        """Not profiled."""
        return ()

    def close(self) -> None:
        """Give back the device's memory; nothing of the session can be used afterwards."""
        self._graph = self._network = None
        self._host = self._input = self._output = self._answer = torch.empty(0)
        if self._way.compiled:
            torch.compiler.reset()
        if self._cuda:
            torch.cuda.empty_cache()

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.inference_mode()
    def _bind(self, images: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Put these images into the buffer of the host; for a new batch size make buffers, compile and record."""
        if self._bound == images.shape:
            self._host.copy_(torch.from_numpy(images))
            return
        host = torch.from_numpy(images).to(_DTYPES[self._way.precision]).contiguous(memory_format=self._format)
        self._host = host.pin_memory() if self._cuda else host.clone(memory_format=self._format)
        self._input = self._host.to(self._device)
        self._graph = None
        if self._way.cuda_graph:
            aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(aside):  # a capture must not meet first calls, which allocate and choose kernels
                for _ in range(3):
                    self._compute()
            torch.cuda.current_stream(self._device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._compute()
            self._graph = graph
        else:
            self._compute()
        self._answer = torch.empty(self._output.shape, dtype=self._output.dtype, pin_memory=self._cuda)
        self._bound = images.shape

    @torch.inference_mode()
    def _compute(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._output = self._network(self._input)

    @torch.inference_mode()
    def _submit(self, marks: list[torch.cuda.Event]) -> float:
        """Put one call on the stream; returns what that took on the host, in seconds."""
        started = time.perf_counter()
        marks[0].record()
        self._input.copy_(self._host, non_blocking=True)
        marks[1].record()
        self._compute()
        marks[2].record()
        self._answer.copy_(self._output, non_blocking=True)
        marks[3].record()
        return time.perf_counter() - started

    @staticmethod
    def _mark() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
