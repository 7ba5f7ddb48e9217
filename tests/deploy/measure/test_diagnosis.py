"""Diagnosis: each cause is found from its own figures, and a model that followed its MACs has none."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from upvits.deploy.measure.bench import LatencyStats, latency_stats
from upvits.deploy.measure.diagnosis import Measured, diagnose, falls_short, kind_of
from upvits.deploy.measure.document import Finding
from upvits.deploy.runtimes import runtime_named
from upvits.deploy.runtimes.interface import Built, CallTimes, LayerTime


def stats(ms: float, *, jitter: float = 0.0, **parts: float) -> LatencyStats:
    """Statistics of calls of `ms`, half of them `jitter` longer; parts in ms."""
    total = np.array([ms, ms * (1 + jitter)] * 50) / 1e3
    return latency_stats([CallTimes(total, **{name: np.full(100, value / 1e3) for name, value in parts.items()})], 1)


def layers(*entries: tuple[str, float], count: int = 1) -> list[LayerTime]:
    return [LayerTime(f"{op}_{i}", op, ms) for op, ms in entries for i in range(count)]


def built(**values: Any) -> Built:
    facts: dict[str, Any] = {
        "source": "test", "layers": 100, "by_precision": {}, "gemms": {}, "planned": {}, "attention_blocks": 12,
        "attention_fused": 12, "casts": 0, "reformats": 0, "memory_bytes": None,
    }  # fmt: skip
    return Built(**{**facts, **values})


DENSE = Measured(macs=4000, latency=stats(4.0))
PRUNED = Measured(macs=1000, latency=stats(3.0))


def found(
    dense: Measured = DENSE, pruned: Measured = PRUNED, runtime: str = "tensorrt", precision: str = "fp16"
) -> list[Finding]:
    return diagnose(dense, pruned, runtime=runtime, precision=precision, batch=1)


def only(findings: Sequence[Finding]) -> Finding:
    assert len(findings) == 1, [finding.cause for finding in findings]
    return findings[0]


def test_no_finding_without_a_shortfall() -> None:
    bad = replace(PRUNED, built=built(attention_fused=0), widths={"embed": 13})
    assert only(found(pruned=replace(bad, widths={}))).cause == "unfused attention"
    assert found(pruned=replace(bad, latency=stats(1.5))) == []
    assert diagnose(DENSE, bad, runtime="tensorrt", precision="fp16", batch=1, speedup=2.6) == []
    assert found(dense=replace(DENSE, macs=1000), pruned=bad) == []


@pytest.mark.parametrize(("gain", "speedup", "short"), [(4, 2.49, True), (4, 2.5, False), (1, 0.5, False)])
def test_a_shortfall_is_less_than_half_of_the_way(gain: float, speedup: float, short: bool) -> None:
    assert falls_short(gain, speedup) is short


def test_launch_bound_by_the_hosts_share() -> None:
    busy_host = replace(PRUNED, latency=stats(3.0, compute=1.0, enqueue=0.85))
    finding = only(found(pruned=busy_host))
    assert finding.cause == "launch-bound"
    assert finding.evidence.startswith("tensorrt fp16, batch 1: ")
    assert "0.850 ms" in finding.evidence
    assert "1.000 ms" in finding.evidence
    assert "--cuda-graph" in finding.advice
    assert found(pruned=replace(PRUNED, latency=stats(3.0, compute=1.0, enqueue=0.79))) == []


def test_advice_fits_the_runtime() -> None:
    short = replace(PRUNED, layers=layers(("Add", 0.004), count=750))
    advice = {name: found(pruned=short, runtime=name)[0].advice for name in ("onnxruntime", "openvino", "tensorrt")}
    assert [name for name, text in advice.items() if "--cuda-graph" in text] == ["tensorrt"]
    assert [name for name, text in advice.items() if "--runtime openvino" in text] == ["onnxruntime"]


def test_launch_bound_by_what_passes_between_layers() -> None:
    sparse = replace(PRUNED, layers=layers(("Relu", 0.05), count=40))
    assert "its 40 layers take 2.00 of 3.00 ms" not in str(found(pruned=replace(sparse, latency=stats(2.5))))
    finding = found(pruned=replace(sparse, latency=stats(3.0)))[0]
    assert finding.cause == "launch-bound"
    assert "40 layers take 2.00 of 3.00 ms" in finding.evidence
    shaky = found(pruned=replace(sparse, latency=stats(2.7, jitter=0.2)))
    assert "launch-bound" not in [finding.cause for finding in shaky]


@pytest.mark.parametrize(
    ("runtime", "ms", "bound"),
    [("tensorrt", 0.004, True), ("tensorrt", 0.015, False), ("onnxruntime", 0.009, True), ("openvino", 0.012, False)],
)
def test_launch_bound_by_short_layers(runtime: str, ms: float, bound: bool) -> None:
    short = replace(PRUNED, layers=layers(("Add", ms), count=int(3 / ms)))
    causes = [finding.cause for finding in found(pruned=short, runtime=runtime)]
    assert ("launch-bound" in causes) is bound


def test_what_profiling_costs_is_taken_off_on_cpus() -> None:
    work = ("Reshape", 0.008), ("MatMul", 0.012), ("Add", 0.048)
    slowed = replace(PRUNED, layers=layers(*work, count=30), latency=stats(1.7))
    finding = found(replace(DENSE, layers=layers(*work, count=30)), slowed, runtime="onnxruntime")[0]
    # of 12 us, 8 were the profiler's: 30 products of 4 us, 30 sums of 40 us, 30 reshapes of nothing
    assert finding.cause == "bound by work outside of matrix products"
    assert finding.evidence.startswith("onnxruntime fp16, batch 1 (layer times less 8 us each for profiling): ")
    assert "from 0.12 to 0.12 ms" in finding.evidence
    assert "91 % of the pruned model's time" in finding.evidence
    assert "from 0.36 to 0.36 ms" in str(found(replace(DENSE, layers=slowed.layers), slowed, runtime="tensorrt"))


def profiled(products: float, rest: float) -> list[LayerTime]:
    return layers(("MatMul", products), ("Softmax", rest / 2), ("Gelu", rest / 2))


def test_work_outside_of_products() -> None:
    dense = replace(DENSE, layers=profiled(3.0, 1.0), widths={"embed": 64, "blocks.0.mlp": 256})
    pruned = replace(PRUNED, latency=stats(1.9), layers=profiled(0.75, 0.7))
    pruned = replace(pruned, widths={"embed": 64, "blocks.0.mlp": 64})
    finding = only(found(dense, pruned))
    assert finding.cause == "memory-bound"
    assert "from 3.00 to 0.75 ms (4.0x, MACs 4.0x)" in finding.evidence
    assert "from 1.00 to 0.70 ms (1.4x)" in finding.evidence
    assert "48 % of the pruned model's time" in finding.evidence
    assert "normalisation and softmax 0.35 ms" in finding.evidence
    assert "embed (64)" in finding.advice
    assert "blocks.0.mlp" not in finding.advice
    on_cpu = only(found(dense, replace(pruned, widths={"embed": 32}), runtime="onnxruntime"))
    assert on_cpu.cause == "bound by work outside of matrix products"
    assert "All widths were cut" in on_cpu.advice
    assert "--runtime openvino" in on_cpu.advice


def test_bandwidth_where_sizes_are_known() -> None:
    sized = [LayerTime("a", "MatMul", 1.0, bytes=10**9), LayerTime("b", "Add", 2.0, bytes=3 * 10**9)]
    finding = only(found(replace(DENSE, layers=layers(("MatMul", 2.5), ("Add", 2.5))), replace(PRUNED, layers=sized)))
    assert "3000.0 MB are read and written at 1500.0 GB/s" in finding.evidence  # 3 GB in 2 ms


def test_products_that_did_not_follow_their_macs() -> None:
    dense = replace(DENSE, layers=profiled(3.5, 0.5))
    finding = found(dense, replace(PRUNED, layers=profiled(2.5, 0.25)))[0]
    assert finding.cause.startswith("compute-bound")
    assert "(1.4x, MACs 4.0x)" in finding.evidence
    assert "--align" in finding.advice


def test_unfused_attention_names_what_is_in_the_way() -> None:
    unfused = replace(PRUNED, built=built(attention_fused=8))
    assert "8 of 12 attention blocks" in only(found(pruned=unfused)).evidence
    assert "--opset 23" in only(found(pruned=unfused)).advice
    assert "fp16" in only(found(pruned=unfused, precision="fp32")).advice
    odd = replace(unfused, head_dims={"blocks.0.attn": 32, "blocks.1.attn": 8})
    finding = only(found(pruned=odd))
    assert "blocks.1.attn (8)" in finding.evidence
    assert "blocks.0.attn" not in finding.evidence
    assert "16 to 256" in finding.advice
    assert found(pruned=replace(PRUNED, built=built(attention_fused=None))) == []
    assert found(pruned=unfused, runtime="onnxruntime") == []  # nothing is fused there, dense or pruned


def test_misaligned_widths_depend_on_the_precision() -> None:
    widths = {f"blocks.{i}.mlp": 24 for i in range(7)} | {"embed": 64}
    narrow = replace(PRUNED, widths=widths)
    assert found(pruned=narrow) == []
    finding = only(found(pruned=narrow, precision="int8"))
    assert "7 of 8 widths are no multiples of 16" in finding.evidence
    assert "and 2 more" in finding.evidence
    assert "embed" not in finding.evidence
    assert "--align 16" in finding.advice
    assert "blocks.0.attn (12)" in only(found(pruned=replace(PRUNED, head_dims={"blocks.0.attn": 12}))).evidence


def test_casts_and_reformats_by_time_or_by_number() -> None:
    work = ("MatMul", 0.8), ("Reformat", 0.12), ("Add", 0.1)
    finding = only(found(pruned=replace(PRUNED, latency=stats(1.2), layers=layers(*work)), dense=slow(1.7)))
    assert finding.cause == "casts and changes of layout"
    assert "Reformat" in finding.evidence
    assert "0.12 of 1.02 ms" in finding.evidence
    counted = replace(PRUNED, built=built(casts=10, reformats=6))
    assert "10 casts and 6 changes of layout among 100 layers" in only(found(pruned=counted)).evidence
    assert found(pruned=replace(PRUNED, built=built(casts=4, reformats=6))) == []
    advice = {name: only(found(pruned=counted, runtime=name, precision="int8")).advice
              for name in ("tensorrt", "onnxruntime", "openvino")}  # fmt: skip
    # what each of them has: no advice may name a precision that its runtime lacks
    assert {name: text.partition("compare --precision ")[2] for name, text in advice.items()} == {
        "tensorrt": "fp16.", "onnxruntime": "fp32.", "openvino": "fp32 or bf16."}  # fmt: skip
    for name in ("onnxruntime", "openvino"):
        assert set(re.findall(r"\w+\d+", advice[name])) <= set(runtime_named(name).precisions)


def slow(ms: float) -> Measured:
    return replace(DENSE, latency=stats(ms))


def test_profiles_that_take_longer_than_the_call_are_no_evidence() -> None:
    work = [*layers(("MatMul", 0.05), count=8), *layers(("Reorder", 0.05), count=8), *layers(("Add", 0.02), count=90)]
    dense, slowed = replace(DENSE, layers=work), replace(PRUNED, layers=work, latency=stats(2.05), threads=2)
    causes = [finding.cause for finding in found(dense, slowed, runtime="openvino")]
    assert causes == ["bound by work outside of matrix products", "casts and changes of layout",
                      "layers that did not shrink", "too many threads for layers so short"]  # fmt: skip
    # the same layers, 2.6 ms of them, in a call of 1.95 ms: 1.33x
    assert found(dense, replace(slowed, latency=stats(1.95)), runtime="openvino") == []
    # 2.6 ms in 2.05 ms of the dense model: what compares both is gone, what speaks of the pruned one stays
    short = found(replace(dense, latency=stats(1.95)), replace(slowed, latency=stats(2.05)), runtime="openvino")
    assert [finding.cause for finding in short] == causes[1:2] + causes[3:]
    counted = replace(slowed, latency=stats(1.0), built=built(casts=30))
    finding = only(diagnose(dense, counted, runtime="openvino", precision="bf16", batch=1, speedup=1.0))
    assert "30 casts" in finding.evidence  # a count, which no profiler slows down


def test_layers_that_did_not_shrink_are_named() -> None:
    dense = [*layers(("MatMul", 0.4), count=8), LayerTime("head", "Gemm", 0.5), LayerTime("patch", "Conv", 0.9)]
    pruned = [*layers(("MatMul", 0.1), count=8), LayerTime("head", "Gemm", 0.3), LayerTime("patch", "Conv", 0.88)]
    finding = found(replace(DENSE, layers=dense), replace(PRUNED, latency=stats(2.0), layers=pruned))[-1]
    assert finding.cause == "layers that did not shrink"
    assert "patch 0.900 to 0.880 ms" in finding.evidence
    assert "head" not in finding.evidence
    assert "1 of 10 layers" in finding.evidence


def test_threads_and_unstable_measurements() -> None:
    short = layers(("MatMul", 0.05), count=50)
    many = replace(PRUNED, layers=short, threads=8)
    assert "--threads 1" in only(found(pruned=many, runtime="onnxruntime")).advice
    assert found(pruned=replace(many, threads=1), runtime="onnxruntime") == []
    shaky = only(found(pruned=replace(PRUNED, latency=stats(3.0, jitter=0.2))))
    assert shaky.cause == "unstable measurement"
    assert "9.1 %" in shaky.evidence


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("FusedMatMul", "products"), ("QLinearConv", "products"), ("DynamicQuantizeMatMul", "products"),
        ("FullyConnected", "products"), ("attention", "products"), ("ScaledDotProductAttention", "products"),
        ("ReorderInput", "reformats"), ("Cast", "reformats"), ("Convert", "reformats"), ("QuantizeLinear", "reformats"),
        ("DequantizeLinear", "reformats"), ("Reshape", "moves"), ("Split", "moves"), ("MVN", "normalisation"),
        ("RMS", "normalisation"),
        ("SkipLayerNormalization", "normalisation"), ("Softmax", "normalisation"), ("Gelu", "other"),
    ],
)  # fmt: skip
def test_kinds_of_layers(op: str, kind: str) -> None:
    assert kind_of(op) == kind
