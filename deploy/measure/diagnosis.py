"""Why is it not faster? What holds latency up when it fell less than the MACs did.

Every finding has its figures as evidence and names the setting that would change them. Facts about kernels hold for
the compilers of TensorRT and TensorRT-RTX (SM80, 89 and 120, fp16); where a time is needed, layers that were not
profiled, or took longer while they were profiled than the whole call does, lead to no finding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from upvits.deploy.graphs.names import module_of
from upvits.deploy.measure.bench import LAUNCH_BOUND, LatencyStats
from upvits.deploy.measure.document import Finding, Latency
from upvits.deploy.measure.layer_table import layer_table
from upvits.deploy.runtimes import RUNTIMES
from upvits.deploy.runtimes.interface import Built, LayerTime

TRUSTED_SUM = 1.3
"""Where layers add up to more than this many times a call, the profiler slowed them down, and not all of them alike."""

_SHORT_LAYER_MS = {"cpu": 0.010, "gpu": 0.005}  # starting such a layer takes about as long as computing it
_NO_WORK = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_SHORT_SHARE = 0.4
_BETWEEN_SHARE = 0.3
_REST_SHARE = 0.4
_REFORMAT_SHARE = 0.1
_REFORMAT_COUNT_SHARE = 0.15
_SAME_TIME = 1.2  # a layer that got faster by less than this did not shrink
_FUSABLE_HEADS = "multiples of 8 from 16 to 256"

# What a layer is mostly about, by a word in its kind; the first that fits counts. Names are those of ONNX, of layers of
# ONNX Runtime and OpenVINO, and of TensorRT's kernels.
_KINDS = (
    ("reformats", r"reorder|reformat|cast|convert|quantize(?!.*(matmul|conv|gemm))"),
    ("products", r"conv|matmul|gemm|attention|mha|fullyconnected|inner.?product|einsum"),
    ("moves", r"transpose|reshape|permute|squeeze|split|slice|concat|gather|copy|shuffle|pad|expand|tile"),
    ("normalisation", r"norm|softmax|mvn|rms|reduce|mean"),
)
_KIND_NAMES = {
    "moves": "transposes, reshapes and other moves",
    "reformats": "casts and changes of layout",
    "normalisation": "normalisation and softmax",
    "other": "element-wise layers",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One of the two models, as it was built and measured in one runtime, precision and batch size.

    Attributes:
        macs: per image.
        latency: of whole calls.
        layers: what the runtime's profiler saw, in order of execution; empty without one.
        built: what the runtime made of the graph; None where it does not tell.
        widths: channels by group name.
        head_dims: channels per head by group name.
        threads: on CPUs, inside operators.
    """

    macs: int
    latency: LatencyStats | Latency
    layers: Sequence[LayerTime] = ()
    built: Built | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    head_dims: Mapping[str, int] = field(default_factory=dict)
    threads: int | None = None


def falls_short(macs_gain: float, speedup: float) -> bool:
    """Whether latency went less than half of the way that the MACs went."""
    return macs_gain > 1 and speedup < 1 + (macs_gain - 1) / 2


def diagnose(
    dense: Measured,
    pruned: Measured,
    *,
    runtime: str,
    precision: str,
    batch: int,
    speedup: float | None = None,
) -> list[Finding]:
    """Say what holds latency up, most important first; nothing when it followed the MACs.

    Args:
        dense: the model before.
        pruned: the model after, in the same runtime, precision and batch size.
        runtime: name of the runtime.
        precision: what both were converted to.
        batch: images per call.
        speedup: how many times faster the pruned one is; by default the ratio of the medians.
    """
    gain = speedup if speedup is not None else dense.latency.median / pruned.latency.median
    if not falls_short(dense.macs / pruned.macs, gain):
        return []
    cpu = RUNTIMES[runtime].on_cpu
    where = f"{runtime} {precision}, batch {batch}"
    if runtime == "onnxruntime" and (cost := _profiling_cost([*dense.layers, *pruned.layers])) > 0:
        dense, pruned = _faster_layers(dense, cost), _faster_layers(pruned, cost)
        where += f" (layer times less {1e3 * cost:.0f} us each for profiling)"
    dense, pruned = _trusted(dense), _trusted(pruned)
    findings = [
        _launch_bound(pruned, runtime, batch),
        _where_time_goes(dense, pruned, runtime, cpu=cpu),
        None if cpu else _unfused_attention(pruned, precision),
        _misaligned(pruned, precision),
        _reformats(pruned, precision, runtime),
        _not_shrunk(dense, pruned),
        _threads(pruned) if cpu else None,
        _unstable(dense, pruned),
    ]
    return [f.model_copy(update={"evidence": f"{where}: {f.evidence}"}) for f in findings if f is not None]


def _profiling_cost(layers: Sequence[LayerTime]) -> float:
    """What profiling adds to a layer, in ms: the time of the fastest layer that has nothing to do.

    ONNX Runtime 1.31 spends about 7 us more on each layer when it profiles: the 337 layers of PVTv2-B0 half as wide,
    64 pixels, batch 1, one thread, sum up to 4.4 ms, and a call takes 1.6 ms.
    """
    return min((layer.ms for layer in layers if layer.op in _NO_WORK), default=0.0)


def _trusted(measured: Measured) -> Measured:
    """The same without layer times that cannot be true.

    OpenVINO 2026.4 profiles PVTv2-B0 in bf16, 64 pixels, batch 8, at 55 ms; a call takes 17 ms.
    """
    total = sum(layer.ms for layer in measured.layers)
    return replace(measured, layers=()) if total > TRUSTED_SUM * measured.latency.median else measured


def _faster_layers(measured: Measured, ms: float) -> Measured:
    return replace(measured, layers=[replace(layer, ms=max(layer.ms - ms, 0.0)) for layer in measured.layers])


def kind_of(op: str) -> str:
    """What a layer is mostly about: "products", "moves", "reformats", "normalisation" or "other"."""
    return next((kind for kind, words in _KINDS if re.search(words, op.lower())), "other")


def _launch_bound(pruned: Measured, runtime: str, batch: int) -> Finding | None:
    """Whether starting layers takes longer than running them: by the host's share, or by layers too short to matter."""
    evidence = []
    enqueue, compute = pruned.latency.enqueue, pruned.latency.compute
    if enqueue is not None and compute is not None and enqueue >= LAUNCH_BOUND * compute:
        evidence.append(f"submitting the work takes the host {enqueue:.3f} ms, the GPU {compute:.3f} ms to do it")
    total, call_ms = sum(layer.ms for layer in pruned.layers), compute or pruned.latency.median
    # layers were profiled at another moment: the difference means something only where the clock stands still
    if pruned.layers and not pruned.latency.unstable and total < (1 - _BETWEEN_SHARE) * call_ms:
        evidence.append(
            f"its {len(pruned.layers)} layers take {total:.2f} of {call_ms:.2f} ms, the other time passes between them"
        )
    limit = _SHORT_LAYER_MS["cpu" if RUNTIMES[runtime].on_cpu else "gpu"]
    short = [layer.ms for layer in pruned.layers if layer.ms < limit]
    if total and sum(short) >= _SHORT_SHARE * total:
        evidence.append(
            f"{len(short)} of its {len(pruned.layers)} layers take less than {1e3 * limit:.0f} us each, together "
            f"{sum(short):.2f} of {total:.2f} ms"
        )
    if not evidence:
        return None
    advice = f"More images per call (batch {batch} here) spread the fixed cost of starting a layer. "
    if runtime == "onnxruntime":
        advice += "Compare a runtime that fuses more layers (--runtime openvino). "
    elif RUNTIMES[runtime].on_nvidia:
        advice += "--cuda-graph replays all launches at once. "
    advice += "Fewer blocks pay more here than narrower ones: prune a shallower model."
    return Finding(cause="launch-bound", evidence=_sentence("In the pruned model, ", evidence), advice=advice)


def _where_time_goes(dense: Measured, pruned: Measured, runtime: str, *, cpu: bool) -> Finding | None:
    """Matrix products against everything else: what each of them gained, and what is left."""
    before, after = _by_kind(dense.layers), _by_kind(pruned.layers)
    if not before.get("products") or not after.get("products"):
        return None
    products = before["products"] / after["products"]
    rest_before = sum(before.values()) - before["products"]
    rest_after = sum(after.values()) - after["products"]
    share = rest_after / sum(after.values())
    text = (
        f"Matrix products and convolutions fell from {before['products']:.2f} to {after['products']:.2f} ms "
        f"({products:.1f}x, MACs {dense.macs / pruned.macs:.1f}x)"
    )
    if rest_after > 0:
        text += f", everything else from {rest_before:.2f} to {rest_after:.2f} ms ({rest_before / rest_after:.1f}x)"
    text += f"; that is {100 * share:.0f} % of the pruned model's time now"
    if share < _REST_SHARE:
        return _compute_bound(text, dense, pruned, products)
    parts = sorted(((ms, _KIND_NAMES[kind]) for kind, ms in after.items() if kind != "products"), reverse=True)
    text += ": " + ", ".join(f"{name} {ms:.2f} ms" for ms, name in parts) + "." + _bandwidth(pruned.layers)
    advice = "This work shrinks with the widths and the number of tokens, the products with the square of the widths. "
    uncut = {name: width for name, width in pruned.widths.items() if dense.widths.get(name) == width}
    advice += (
        f"Not cut: {_examples(uncut)}; --components decides about them."
        if uncut
        else "All widths were cut; smaller images (--image-size) mean fewer tokens."
    )
    fusing = {"onnxruntime": "openvino", "onnxruntime-cuda": "tensorrt or tensorrt-rtx"}.get(runtime)
    if fusing is not None:
        advice += f" Compare a runtime that fuses such layers into the products (--runtime {fusing})."
    return Finding(
        cause="bound by work outside of matrix products" if cpu else "memory-bound", evidence=text, advice=advice
    )


def _compute_bound(text: str, dense: Measured, pruned: Measured, gain: float) -> Finding | None:
    if not falls_short(dense.macs / pruned.macs, gain):
        return None  # neither the products nor the other layers: another finding says more
    return Finding(
        cause="compute-bound, products too narrow to run at full speed",
        evidence=text + "." + _bandwidth(pruned.layers),
        advice=(
            "Narrow products use less of the arithmetic units: keep widths at multiples of 32 or 64 (--align 32), or "
            "take more images per call."
        ),
    )


def _unfused_attention(pruned: Measured, precision: str) -> Finding | None:
    built = pruned.built
    if built is None or built.attention_fused is None or built.attention_fused >= built.attention_blocks:
        return None
    odd = {name: dim for name, dim in pruned.head_dims.items() if dim % 8 or not 16 <= dim <= 256}
    evidence = f"{built.attention_fused} of {built.attention_blocks} attention blocks are one fused kernel"
    if precision == "fp32":
        advice = "Attention in fp32 is not fused: use --precision fp16."
    elif odd:
        evidence += f"; channels per head: {_examples(odd)}"
        advice = f"Channels per head that are {_FUSABLE_HEADS} are fused: prune with --align 8 or 16."
    elif precision in ("int8", "fp8"):
        advice = (
            "Around quantized products, all other layers have to be fp16 and the attention products unquantized; "
            "quantized attention needs 16, 32 or 64 channels per head and at most 512 tokens. Compare --precision fp16."
        )
    else:
        advice = "Export with --opset 23, which keeps attention as one node, and compare; --require-fused-attention."
    return Finding(cause="unfused attention", evidence=evidence + ".", advice=advice)


def _misaligned(pruned: Measured, precision: str) -> Finding | None:
    multiple = 16 if precision in ("int8", "fp8") else 8
    odd = {name: width for name, width in pruned.widths.items() if width % multiple}
    heads = {name: dim for name, dim in pruned.head_dims.items() if dim % 8}
    if not odd and not heads:
        return None
    evidence = []
    if odd:
        evidence.append(
            f"{len(odd)} of {len(pruned.widths)} widths are no multiples of {multiple}, which {precision} kernels work "
            f"in: {_examples(odd)}"
        )
    if heads:
        evidence.append(f"channels per head that are no multiples of 8: {_examples(heads)}")
    return Finding(
        cause="misaligned widths",
        evidence=_sentence("", evidence),
        advice=f"Prune with --align {multiple}; 32 or 64 are better still. Other widths are padded and copied.",
    )


def _reformats(pruned: Measured, precision: str, runtime: str) -> Finding | None:
    after = _by_kind(pruned.layers)
    changes = [layer for layer in pruned.layers if kind_of(layer.op) == "reformats"]
    total = sum(after.values())
    built = pruned.built
    if changes and after["reformats"] >= _REFORMAT_SHARE * total:
        names = ", ".join(dict.fromkeys(layer.op for layer in sorted(changes, key=lambda layer: -layer.ms)))
        evidence = (
            f"{len(changes)} layers only change type or layout ({names}): {after['reformats']:.2f} of {total:.2f} ms"
        )
    elif not changes and built is not None and built.casts + built.reformats >= _REFORMAT_COUNT_SHARE * built.layers:
        evidence = f"{built.casts} casts and {built.reformats} changes of layout among {built.layers} layers"
    else:
        return None
    if precision in ("int8", "fp8"):
        wider = {"onnxruntime": "fp32", "openvino": "fp32 or bf16"}.get(runtime, "fp16")
        advice = f"Every border between quantized and other layers costs a cast: compare --precision {wider}."
    elif runtime == "onnxruntime":
        advice = (
            "ONNX Runtime runs convolutions in a blocked layout and converts tensors before and after each of them; "
            "compare --runtime openvino. Models without convolutions in their blocks (ViT, DeiT) have none."
        )
    else:
        advice = "Widths at multiples of 8 (--align 8) need no padded copies; one precision throughout needs no casts."
    return Finding(cause="casts and changes of layout", evidence=evidence + ".", advice=advice)


def _not_shrunk(dense: Measured, pruned: Measured) -> Finding | None:
    total = sum(layer.ms for layer in pruned.layers)
    same = [
        (layer.pruned_ms, layer.dense_ms, layer.name)
        for layer in layer_table(dense.layers, pruned.layers)
        if layer.dense_ms is not None and layer.pruned_ms and layer.dense_ms < _SAME_TIME * layer.pruned_ms
    ]
    together = sum(ms for ms, _, _ in same)
    if together < 0.1 * total or not same:
        return None
    worst = "; ".join(
        f"{module_of(name)} {before:.3f} to {after:.3f} ms" for after, before, name in sorted(same, reverse=True)[:5]
    )
    return Finding(
        cause="layers that did not shrink",
        evidence=(
            f"{len(same)} of {len(pruned.layers)} layers take as long as in the dense model (less than {_SAME_TIME}x "
            f"faster), together {together:.2f} of {total:.2f} ms; the longest: {worst}."
        ),
        advice=(
            "Layers of a few microseconds take what starting them takes; longer ones depend on what was not cut: the "
            "number of tokens (--image-size), or parts that --components leaves out."
        ),
    )


def _threads(pruned: Measured) -> Finding | None:
    total = sum(layer.ms for layer in pruned.layers)
    short = sum(layer.ms for layer in pruned.layers if layer.ms < 0.1)
    if not total or pruned.threads is None or pruned.threads < 2 or short < 0.5 * total:
        return None
    return Finding(
        cause="too many threads for layers so short",
        evidence=(
            f"{pruned.threads} threads share each layer, and layers below 0.1 ms make up {short:.2f} of {total:.2f} ms."
        ),
        advice=(
            "Compare `upvits-deploy bench RUN --threads 1`: other threads wake up too late for short layers. The cores "
            "serve more images per second with several sessions (--streams)."
        ),
    )


def _unstable(dense: Measured, pruned: Measured) -> Finding | None:
    if not (dense.latency.unstable or pruned.latency.unstable):
        return None
    return Finding(
        cause="unstable measurement",
        evidence=(
            f"Calls of the dense model spread by a CV of {100 * dense.latency.cv:.1f} %, of the pruned one by "
            f"{100 * pruned.latency.cv:.1f} %; trust goes up to 2.5 %."
        ),
        advice="Stop other jobs and measure longer (--bench-seconds) before small differences are taken seriously.",
    )


def _by_kind(layers: Sequence[LayerTime]) -> dict[str, float]:
    times: dict[str, float] = {}
    for layer in layers:
        kind = kind_of(layer.op)
        times[kind] = times.get(kind, 0.0) + layer.ms
    return times


def _bandwidth(layers: Sequence[LayerTime]) -> str:
    """How fast everything but the products reads and writes, where the runtime tells sizes."""
    known = [(layer.bytes, layer.ms) for layer in layers if layer.bytes is not None and kind_of(layer.op) != "products"]
    ms = sum(time for _, time in known)
    if not ms:
        return ""
    total = sum(size for size, _ in known)
    return f" Outside of the products, {total / 1e6:.1f} MB are read and written at {total / ms / 1e6:.1f} GB/s."


def _examples(values: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} ({value})" for name, value in list(values.items())[:5])
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _sentence(start: str, parts: Sequence[str]) -> str:
    text = start + "; ".join(parts) + "."
    return text[0].upper() + text[1:]
