"""How big a network is: multiply-accumulates and parameters, counted rather than derived."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one image, attention products included.

    Counted by torch's FlopCounterMode (matrix products and convolutions; norms, activations and softmax are not in
    it) on the meta device, so it costs neither memory nor arithmetic.

    Args:
        model: any network.
        input_size: (channels, height, width) in pixels.

    Example:
        >>> import torch
        >>> count_macs(torch.nn.Conv2d(3, 8, kernel_size=4, stride=4), (3, 32, 32))
        24576
    """
    meta = copy.deepcopy(model).to("meta").eval()
    with flop_counter() as counter, torch.inference_mode():
        meta(torch.empty(1, *input_size, device="meta"))
    return int(counter.get_total_flops()) // 2


def flop_counter() -> FlopCounterMode:
    """torch's counter, silent. It is imported here: it brings in Triton's compiler, which takes a third of a second."""
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def count_params(model: nn.Module) -> int:
    """Number of parameters.

    Example:
        >>> import torch
        >>> count_params(torch.nn.Linear(10, 5))
        55
    """
    return sum(parameter.numel() for parameter in model.parameters())
