"""What a call of ONNX Runtime reads and writes: buffers that are bound once, and stay on the GPU where it runs on one.

Without them every call would allocate its outputs and copy from ordinary memory, and what is compared is allocators.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from upvits.deploy.runtimes.buffers import Buffer, new_buffer
from upvits.deploy.runtimes.interface import Arrays, CallTimes


class Binding:
    """Buffers of a session for one set of shapes."""

    def __init__(
        self,
        session: Any,
        feeds: Arrays,
        output_names: tuple[str, ...],
        device: tuple[str, int],
        *,
        first: Callable[[Any], None],
        run: Callable[[Any], None],
    ) -> None:
        """Bind them.

        Args:
            session: of the library.
            feeds: inputs by name.
            output_names: names of the outputs.
            device: kind and number, such as ("cuda", 0).
            first, run: make the first call, and later ones, with a binding of the library.
        """
        kind, number = device
        place = kind if kind == "cpu" else f"{kind}:{number}"
        self._binding, self._run, self._on_cpu = session.io_binding(), run, kind == "cpu"
        self._inputs = {name: new_buffer(array.shape, array.dtype, place) for name, array in feeds.items()}
        for name, buffer in self._inputs.items():
            self._binding.bind_input(name, kind, number, feeds[name].dtype, *_memory(buffer))
        for name in output_names:
            self._binding.bind_output(name, kind, number)
        self._copy_in(feeds)
        started = time.perf_counter()
        first(self._binding)
        self.first_run_ms = round(1e3 * (time.perf_counter() - started))
        made = dict(zip(output_names, self._binding.copy_outputs_to_cpu(), strict=True))  # tells shapes and types
        self._outputs = {name: new_buffer(array.shape, array.dtype, place) for name, array in made.items()}
        for name, buffer in self._outputs.items():
            self._binding.bind_output(name, kind, number, made[name].dtype, *_memory(buffer))

    def call(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name, in arrays of the caller's."""
        self._copy_in(feeds)
        self._run(self._binding)
        self._copy_out()
        return {name: buffer.host.numpy().copy() for name, buffer in self._outputs.items()}

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        """Time calls with the same inputs. Copies wait until they are done, and so does a call of the library."""
        self._fill(feeds)
        if self._on_cpu:
            total = np.empty(calls)
            for index in range(calls):
                started = time.perf_counter()
                self._run(self._binding)
                total[index] = time.perf_counter() - started
            return CallTimes(total=total)
        marks = np.empty((calls, 4))
        for row in marks:
            row[0] = time.perf_counter()
            self._to_device()
            row[1] = time.perf_counter()
            self._run(self._binding)
            row[2] = time.perf_counter()
            self._copy_out()
            row[3] = time.perf_counter()
        steps = np.diff(marks, axis=1)
        return CallTimes(total=steps.sum(1), h2d=steps[:, 0], compute=steps[:, 1], d2h=steps[:, 2])

    def _fill(self, feeds: Arrays) -> None:
        for name, buffer in self._inputs.items():
            buffer.fill(feeds[name])

    def _copy_in(self, feeds: Arrays) -> None:
        self._fill(feeds)
        if not self._on_cpu:
            self._to_device()

    def _to_device(self) -> None:
        for buffer in self._inputs.values():
            buffer.device.copy_(buffer.host)

    def _copy_out(self) -> None:
        for buffer in self._outputs.values():
            buffer.host.copy_(buffer.device)


def _memory(buffer: Buffer) -> tuple[tuple[int, ...], int]:
    return tuple(buffer.device.shape), buffer.device.data_ptr()
