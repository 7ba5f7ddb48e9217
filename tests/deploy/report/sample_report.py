"""A whole report as a run of the demo model gives it: two CPU runtimes measured, TensorRT-RTX engines only built."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

from PIL import Image

from upvits.deploy.measure.answers import thumbnail
from upvits.deploy.report.document import Report

JPEG = thumbnail(Image.new("RGB", (64, 48), (120, 40, 90)), 192)
QUANTILES = 51
GEMMS = 50
BLOCKS = 8
RUNTIMES = {
    # runtime -> precision -> ms at batch 8, dense and pruned, top-1 of both, SQNR of both
    "onnxruntime": {
        "fp32": (13.91, 7.88, 98.92, 98.08, 128.4, 129.1),
        "bf16": (16.42, 9.94, 98.92, 98.08, 41.7, 42.3),
        "int8": (9.71, 6.31, 98.83, 97.92, 36.2, 34.9),
    },
    "openvino": {
        "fp32": (11.38, 5.97, 98.92, 98.08, 126.0, 127.2),
        "bf16": (6.12, 3.64, 98.92, 98.08, 40.9, 41.8),
        "int8": (5.27, 3.02, 98.75, 98.0, 35.8, 34.4),
    },
}
BATCH_ONE = {"onnxruntime": 0.27, "openvino": 0.24}
CPU = {"onnxruntime": "onnxruntime (CPU)", "openvino": "openvino (CPU)"}


def sample_report(**changes: Any) -> Report:
    """The report with some of its fields replaced."""
    return Report.model_validate({**sample_document(), **changes})


def sample_document() -> dict[str, Any]:
    """The JSON values of `sample_report()`; figures are those of a run, or in proportion to them."""
    return {
        "model": "pvt_v2_b0",
        "ratio": 0.5,
        "data": "demo",
        "weights": "demo",
        "dense": {"params": 3412844, "macs": 43334656, "top1": 98.91666666666667, "latency_ms": latencies(0)},
        "pruned": {
            "params": 871868,
            "macs": 11705856,
            "top1": 98.08333333333333,
            "top1_after_prune": 94.83333333333333,
            "top1_after_deletion": 38.333333333333336,
            "agreement": 98.5,
            "latency_ms": latencies(1),
        },
        **speedups(),
        "parity": list(parities()),
        "engines": list(engines()),
        "accuracy": list(accuracies()),
        "throughput": list(throughputs()),
        "best": list(bests()),
        "layer_times": [layer_times("openvino", "int8"), layer_times("onnxruntime", "fp32")],
        "findings": [
            {
                "cause": "Memory-bound layers take most of the time",
                "evidence": "Softmax, LayerNormalization and transposes take 46 % of the pruned model's time and "
                "29 % of the dense one's; they shrink with the width, not with its square.",
                "advice": "Prune depth as well as width, or run larger batches.",
            },
            {
                "cause": "Widths that kernels pad",
                "evidence": "stages.2 has width 80 in int8; kernels work on multiples of 32.",
                "advice": "Use --align 32.",
            },
        ],
        "stages": [
            {"name": name, "seconds": seconds, "peak_rss_mb": peak, "skipped": name == "1-score"}
            for name, seconds, peak in (
                ("1-score", 17.936, 1165.4),
                ("2-prune", 7.164, 1172.7),
                ("3-distill", 153.89, 1255.1),
                ("4-export", 24.095, 1359.8),
                ("5-engine/openvino-int8", 8.973, 1558.2),
                ("6-bench", 122.147, 1471.2),
            )
        ],
        "plan": {
            "asked": {"ratio": 0.5, "align": 8, "components": "embed,attention,ffn"},
            "got": {"macs_share": 0.2701, "params_share": 0.2555},
            "widths": list(widths()),
            "planner": "uniform",
            "blocks": {"stages.2.blocks": [[0, 1], [2, 2]]},
            "unstable": [{"group": "stages.0", "spearman": 0.71, "overlap": 0.6875}],
        },
        "compensation": {
            "images": 512,
            "held_out": 102,
            "kl_deleted": 1.8253826828476878,
            "kl_cut": 1.8701088367469718,
            "kl": 0.12034105469860486,
            "accepted": True,
            "layers": 52,
            "refitted": 47,
            "seconds": 16.55,
            "warnings": ["stages.3.blocks.1.mlp.fc2: 410 rows for 512 inputs"],
        },
        "target": {
            "asked": "2x",
            "runtime": "openvino",
            "precision": "fp32",
            "batch": 8,
            "searched": {"dense_ms": 11.41, "ms": 5.61, "speedup": 2.03, "low": 1.98, "high": 2.11},
            "measured": {"dense_ms": 11.38, "ms": 5.97, "speedup": 1.91, "low": 1.88, "high": 1.95},
            "met": True,
        },
        "answers": answers(),
        "learning": [
            {"epoch": epoch, "loss": 12.3 / epoch, "top1": 96.5 + 0.5 * epoch, "agreement": None, "seconds": 51.2}
            for epoch in (1, 2, 3)
        ],
        "measurement": {
            "accuracy": "top-1 on 1200 validation images, by PyTorch in fp32",
            "scores": "fisher on 256 training images",
            "fine-tuning": "3 epochs of 6000 images, batch 32",
            "latency": "all engines in turns, 20 rounds, warm-up 5 calls, about 10 s per batch size; "
            "wall time with inputs and outputs on the host",
            "sessions": {"onnxruntime fp32": {"provider": "CPUExecutionProvider", "intra_op_threads": 2}},
        },
        "environment": {
            "version": "0.3.0",
            "python": "3.11.7",
            "system": "Linux 6.18 x86_64",
            "cpu": "Intel(R) Xeon(R) Processor",
            "cores_usable": 2,
            "load_average": 1.55,
            "memory_gib": 23.5,
            "gpus": [],
            "driver": None,
            "libraries": {"torch": "2.15.0", "timm": "1.0.31", "onnxruntime": "1.31.1", "openvino": "2026.4.0"},
        },
        "reproduce": ["upvits-deploy build --recipe recipe.toml --output runs/pvt_v2_b0-r0.50-again"],
        "notes": [
            "tensorrt was left out: The package tensorrt is not installed. pip install 'upvits-deploy[tensorrt]'",
            "tensorrt-rtx engines were built but not run here: No NVIDIA GPU can be used.",
        ],
    }


CLASSES = tuple(f"{pattern} {shape}" for pattern in ("plain", "striped", "dotted", "checkered") for shape in
                ("disk", "square", "triangle", "cross"))  # fmt: skip


def answers() -> dict[str, Any]:
    """100 images of each class; the first classes lose, the last one wins. Two answers differ, one does not."""

    def given(*names: str) -> list[dict[str, Any]]:
        return [{"label": name, "percent": 70.0 / 3**place} for place, name in enumerate(names)]

    classes = [
        {"name": name, "images": 100, "dense": 98 - place % 3, "lost": max(0, 6 - place), "won": int(place == 15)}
        for place, name in enumerate(CLASSES)
    ]
    disk, square, cross = (f"plain {shape}" for shape in ("disk", "square", "cross"))
    samples = [
        {"truth": truth, "dense": given(dense, cross), "pruned": given(pruned, cross), "agree": dense == pruned,
         "image": JPEG}
        for truth, dense, pruned in ((disk, disk, square), (square, disk, square), (disk, disk, disk))
    ]  # fmt: skip
    return {"images": 1600, "differing": 24, "classes": classes, "samples": samples}


def latency(median: float, batch: int = 1, cv: float = 0.011, **parts: float) -> dict[str, Any]:
    """Calls that spread evenly around a median, with a longer tail to the slow side."""
    normal = NormalDist()
    quantiles = [
        median * (1 + cv * z * (1.6 if z > 0 else 0.8))
        for z in (normal.inv_cdf(min(max(i / (QUANTILES - 1), 0.002), 0.998)) for i in range(QUANTILES))
    ]
    return {
        "min": quantiles[0],
        "median": median,
        "mean": median * (1 + cv / 4),
        "p90": quantiles[45],
        "p95": (quantiles[47] + quantiles[48]) / 2,
        "p99": (quantiles[49] + quantiles[50]) / 2,
        "cv": cv,
        "images_per_s": 1000 * batch / median,
        "n": 400,
        "unstable": cv > 0.025,
        "quantiles": quantiles,
        "threads": 2,
        **parts,
    }


def latencies(model: int) -> dict[str, Any]:
    """Of the dense (0) or the pruned (1) model; one measurement is unstable."""
    tree: dict[str, Any] = {}
    for runtime, by_precision in RUNTIMES.items():
        for precision, figures in by_precision.items():
            wild = (runtime, precision, model) == ("onnxruntime", "bf16", 1)
            tree.setdefault(runtime, {})[precision] = {
                "b1": latency(figures[model] * BATCH_ONE[runtime], 1, 0.019),
                "b8": latency(figures[model], 8, 0.064 if wild else 0.011),
            }
    return tree


def speedups() -> dict[str, Any]:
    tables: dict[str, Any] = {"speedup": {}, "speedup_low": {}, "speedup_high": {}}
    for name, factor in (("speedup", 1.0), ("speedup_low", 0.97), ("speedup_high", 1.04)):
        for runtime, by_precision in RUNTIMES.items():
            tables[name][runtime] = {
                precision: {batch: round(factor * figures[0] / figures[1], 3) for batch in ("b1", "b8")}
                for precision, figures in by_precision.items()
            }
    return tables


def parities() -> Iterator[dict[str, Any]]:
    for model, worst in (("dense", 5.72e-06), ("pruned", 2.86e-06)):
        for runtime, by_precision in RUNTIMES.items():
            for precision in by_precision:
                exact = precision == "fp32"
                yield {
                    "model": model,
                    "reference": "PyTorch",
                    "candidate": f"{runtime} {precision}",
                    "images": 64,
                    "max_abs": worst if exact else 0.113,
                    "min_cosine": 0.9999999999999 if exact else 0.999412,
                    "top1_agreement": 100.0,
                    "passed": True,
                }


def built(precision: str, runtime: str) -> dict[str, Any]:
    asked = {precision: GEMMS} if precision != "int8" else {"int8": GEMMS - 1, "fp32": 1}
    return {
        "source": "compiled graph in the plan" if runtime == "tensorrt-rtx" else "runtime graph",
        "layers": 214,
        "by_precision": {precision: 160, "fp32": 54} if precision != "fp32" else {"fp32": 214},
        "gemms": asked,
        "planned": asked,
        "attention_blocks": BLOCKS,
        "attention_fused": {"tensorrt-rtx": BLOCKS, "openvino": BLOCKS}.get(runtime),
        "casts": 4 if precision == "int8" else 0,
        "reformats": 11,
        "memory_bytes": 9437184 if runtime == "tensorrt-rtx" else None,
    }


def engines() -> Iterator[dict[str, Any]]:
    sizes = {"fp32": (13707604, 3543553), "bf16": (6925310, 1834112), "int8": (3838129, 1092253)}
    for runtime, precisions in {**RUNTIMES, "tensorrt-rtx": ("fp16", "int8")}.items():
        for precision in precisions:
            for index, model in enumerate(("dense", "pruned")):
                rtx = runtime == "tensorrt-rtx"
                suffix = {"tensorrt-rtx": "engine.plan", "openvino": "model.xml"}.get(runtime, "model.onnx")
                yield {
                    "model": model,
                    "runtime": runtime,
                    "precision": precision,
                    "target": "sm86, sm89, sm120" if rtx else "any",
                    "path": f"5-engine/{runtime}-{precision}/{model}/{suffix}",
                    "bytes": (16544380, 11396396)[index] if rtx else sizes[precision][index],
                    "seconds": 3.9 if rtx else 0.4,
                    "built": built(precision, runtime),
                }


def accuracies() -> Iterator[dict[str, Any]]:
    for runtime, by_precision in RUNTIMES.items():
        for precision, figures in by_precision.items():
            for index, model in enumerate(("dense", "pruned")):
                reduced = precision == "int8"
                yield {
                    "model": model,
                    "runtime": runtime,
                    "precision": precision,
                    "images": 1200,
                    "top1": figures[2 + index],
                    "agreement": 100.0 if not reduced else 99.42,
                    "drop": round((98.92, 98.08)[index] - figures[2 + index], 2),
                    "sqnr_db": figures[4 + index],
                    "measured_on": CPU[runtime],
                    **(
                        {
                            "rest": "fp32",
                            "quantized": GEMMS - 1 - index,
                            "kept": ["/stages.3/blocks.1/mlp/fc2/MatMul"] * index,
                            "worst_layer": "/stages.2/blocks.0/attn/proj/MatMul",
                            "worst_layer_sqnr_db": 24.6,
                        }
                        if reduced
                        else {}
                    ),
                }


def bests() -> Iterator[dict[str, Any]]:
    for runtime, by_precision in RUNTIMES.items():
        dense, pruned = by_precision["fp32"][0], by_precision["int8"][1]
        yield {
            "runtime": runtime,
            "precision": "int8",
            "batch": 8,
            "dense_precision": "fp32",
            "dense_ms": dense,
            "pruned_ms": pruned,
            "speedup": round(dense / pruned, 3),
            "low": round(0.97 * dense / pruned, 3),
            "high": round(1.04 * dense / pruned, 3),
            "passed_over": {
                precision: f"{by_precision[precision][1]:.2f} ms, slower than int8 at equal accuracy."
                for precision in ("fp32", "bf16")
            },
        }


def throughputs() -> Iterator[dict[str, Any]]:
    for index, model in enumerate(("dense", "pruned")):
        for streams in (1, 2):
            yield {
                "model": model,
                "runtime": "openvino",
                "precision": "int8",
                "batch": 8,
                "streams": streams,
                "images_per_s": round(8000 / RUNTIMES["openvino"]["int8"][index] * (1 + 0.1 * (streams - 1)), 1),
            }


def layer_times(runtime: str, precision: str) -> dict[str, Any]:
    """Layers of eight blocks; the dense model alone has a reformat, and the pruned one a pad."""
    total = RUNTIMES[runtime][precision]
    kinds = (("attn/q", "MatMul", 2.0), ("attn/softmax", "Softmax", 1.4), ("mlp/fc1", "MatMul", 5.0),
             ("mlp/act", "Gelu", 1.0), ("mlp/fc2", "MatMul", 4.6))  # fmt: skip
    every = [
        (f"/stages.{stage}/blocks.{block}/{name}/{op}", op, weight * (1.4 - 0.2 * stage) * (1 + 0.03 * block))
        for stage in range(4)
        for block in range(2)
        for name, op, weight in kinds
    ]
    scale = sum(weight for _, _, weight in every)
    layers = [
        {
            "name": name,
            "op": op,
            "dense_ms": round(total[0] * weight / scale, 4),
            "pruned_ms": round(total[1] * weight / scale * (1.3 if op == "Softmax" else 0.95), 4),
        }
        for name, op, weight in every
    ]
    layers.append({"name": "reformat of images", "op": "Reorder", "dense_ms": 0.031, "pruned_ms": None})
    layers.append({"name": "pad of /stages.2", "op": "Pad", "dense_ms": None, "pruned_ms": 0.018})
    return {"runtime": runtime, "precision": precision, "batch": 8, "layers": layers}


def widths() -> Iterator[dict[str, Any]]:
    for stage, (embed, hidden) in enumerate(((32, 256), (64, 512), (160, 640), (256, 1024))):
        yield {"group": f"stages.{stage}", "before": embed, "after": embed // 2}
        for block in range(2):
            yield {"group": f"stages.{stage}.blocks.{block}.attn", "before": embed, "after": embed // 2}
            yield {"group": f"stages.{stage}.blocks.{block}.mlp", "before": hidden, "after": hidden // 2}
