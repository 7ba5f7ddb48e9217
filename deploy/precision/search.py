"""Putting the worst layers back until the accuracy holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from upvits.deploy.precision.calibration import Ranges
from upvits.deploy.precision.convert import Converted, convert


@dataclass(frozen=True, slots=True)
class PutBack:
    """The result of a search.

    Attributes:
        converted: the model with the fewest layers put back that holds; with all of them when nothing holds.
        layers: names of the nodes that were put back, worst first.
        holds: whether the model holds.
        tried: how many models were judged.
    """

    converted: Converted
    layers: tuple[str, ...]
    holds: bool
    tried: int


def put_back(
    model: ModelProto,
    ranges: Ranges | None,
    precision: str,
    base_precision: str,
    order: Sequence[str],
    holds: Callable[[Converted], bool],
) -> PutBack:
    """Keep the first 0, 1, 2, 4, ... layers of `order` out of a precision until the model holds, then as few as can be.

    Args:
        model: fp32 ONNX model.
        ranges: from `calibrate`, for int8 and fp8.
        precision: "fp16", "bf16", "int8" or "fp8".
        base_precision: what layers that are put back compute in; fp32 with fp16 and bf16.
        order: names of nodes, worst first (`layer_sqnr` gives them so).
        holds: judges a model.

    Raises:
        UserError: what `convert` raises.
    """
    failed = 0  # so many were not enough
    count = 0
    tried = 0
    while True:
        best = convert(model, precision, ranges=ranges, base_precision=base_precision, keep=order[:count])
        tried += 1
        if holds(best):
            break
        if count == len(order):
            return PutBack(best, tuple(order), False, tried)
        failed, count = count, min(max(1, 2 * count), len(order))
    while count - failed > 1:
        middle = (failed + count) // 2
        candidate = convert(model, precision, ranges=ranges, base_precision=base_precision, keep=order[:middle])
        tried += 1
        if holds(candidate):
            best, count = candidate, middle
        else:
            failed = middle
    return PutBack(best, tuple(order[:count]), True, tried)
