"""From an fp32 graph to a graph of any precision."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from onnx import ModelProto

from upvits.calib_data.errors import UserError
from upvits.deploy.choices import PRECISIONS
from upvits.deploy.precision.calibration import Ranges
from upvits.deploy.precision.half import HALVES, to_half
from upvits.deploy.precision.quantize import quantizable_layers, quantize
from upvits.deploy.precision.smoothing import fold_outliers
from upvits.deploy.precision.weight_layers import nothing_to_quantize, prepared

QUANTIZED = ("int8", "fp8")


@dataclass(frozen=True, slots=True)
class Converted:
    """A model in a precision.

    Attributes:
        model: the graph to build.
        precision: what was asked for.
        base_precision: what the layers that are not quantized compute in; the precision itself for fp32, fp16 and bf16.
        quantized: names of the nodes that compute in int8 or fp8.
        kept: names of the nodes that were kept out of the precision.
        folded: names of the LayerNorms whose outliers moved into weights.
        ranges: the ones that it was quantized with; None for fp32, fp16 and bf16.
    """

    model: ModelProto
    precision: str
    base_precision: str
    quantized: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    ranges: Ranges | None = None


def convert(
    model: ModelProto,
    precision: str,
    *,
    ranges: Ranges | None = None,
    base_precision: str = "fp16",
    keep: Sequence[str] = (),
) -> Converted:
    """The model in a precision; the same object for "fp32".

    int8: outliers of LayerNorms move into weights, then matrix products and convolutions with constant weights are
    quantized, then everything else becomes fp16. fp8 values have exponents and need no such fold: with channels of
    LayerNorm 30 to 100 times too large PVTv2-B0 keeps 33 dB in fp8 without it, but 4 dB in int8.

    With a base precision of fp32, as CPUs have it, results of int8 convolutions are quantized too: ONNX Runtime has no
    int8 convolution with an fp32 result and would dequantize the weights in every call. PVTv2-B0 at 64 pixels, batch 8,
    1 thread: 18.4 ms in fp32, 48.7 without, 14.8 with it; OpenVINO 21.3, 15.6 and 15.9. It costs 4.9 dB of 40.2.

    Args:
        model: fp32 ONNX model.
        precision: from PRECISIONS.
        ranges: from `calibrate`, for int8 and fp8.
        base_precision: "fp16" or "fp32", of what is not quantized.
        keep: names of nodes that stay in `base_precision`, with fp16 and bf16 in fp32.

    Raises:
        UserError: the precision is unknown, ranges are missing, nothing can be quantized, a weight is too large
            for fp16, or the graph has control flow.
    """
    if precision not in PRECISIONS:
        near = difflib.get_close_matches(precision, PRECISIONS, n=1)
        raise UserError(
            f"unknown precision {precision!r}" + (f"; did you mean {near[0]}?" if near else ""),
            fix=f"Precisions: {', '.join(PRECISIONS)}.",
        )
    if precision == "fp32":
        return Converted(model, precision, precision)
    if precision in HALVES:
        return Converted(to_half(model, precision, keep_nodes=keep), precision, precision, kept=tuple(keep))
    if ranges is None:
        raise UserError(f"{precision} needs ranges of the activations", fix="Calibrate with some images first.")
    base, base_ranges = prepared(model), ranges
    folded: tuple[str, ...] = ()
    if precision == "int8":
        base, base_ranges, folded = fold_outliers(base, ranges)
    on_cpu = precision == "int8" and base_precision == "fp32"
    layers = quantizable_layers(base, precision, on_cpu=on_cpu)
    if not layers:
        raise nothing_to_quantize()
    chosen = [layer for layer in layers if layer.name not in keep]
    result = quantize(base, base_ranges, precision, chosen, conv_results=on_cpu)
    return Converted(
        to_half(result, base_precision) if base_precision in HALVES else result,
        precision,
        base_precision,
        quantized=tuple(layer.name for layer in chosen),
        kept=tuple(layer.name for layer in layers if layer.name in keep),
        folded=folded,
        ranges=ranges,
    )
