"""Networks without weights: shapes alone, on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_)
_OF_LAYERS = (nn.init.kaiming_uniform_, nn.init.uniform_)  # of nn.Linear; nobody asks for what is inside these


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built here gets no memory, and its random initialisation does nothing.

    torch computes random values of the meta device, which has none, with the parts of its compiler: that takes longer
    than everything else about a small network.

    Example:
        >>> with on_meta():
        ...     layer = torch.nn.Linear(2, 3)
        >>> layer.weight.is_meta, tuple(layer.weight.shape)
        (True, (3, 2))
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _IN_PLACE and args[0].is_meta:
            return args[0]
        if func in _OF_LAYERS and kwargs is not None and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))
