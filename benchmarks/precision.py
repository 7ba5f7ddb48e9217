"""What each precision costs: top-1 and SQNR against fp32, plain and with planted outliers, with the fold and without.

python -m benchmarks.precision runs/pvt_v2_b0-r0.50 [RUN ...]     # finished runs; JSON into --out

Everything is computed by ONNX Runtime on the CPU from the runs' fp32 ONNX files: calibrated on training images, judged
on validation images. Nothing is searched or put back: these are the first graphs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from rich.console import Console
from rich.table import Table

from upvits import toolchain
from upvits.calib_data import DataSource, Preprocess, batches, open_data, proxy_images
from upvits.deploy.graphs.files import load_model
from upvits.deploy.machine.environment import environment
from upvits.deploy.measure.accuracy import Accuracy, accuracy, outputs_of
from upvits.deploy.precision import Ranges, calibrate, convert, for_cpu
from upvits.deploy.precision.half import to_half
from upvits.deploy.precision.quantize import quantizable_layers, quantize
from upvits.deploy.precision.smoothing import ChannelPaths
from upvits.deploy.precision.weight_layers import prepared
from upvits.deploy.runtimes import open_model
from upvits.deploy.stages.job import validation_images
from upvits.deploy.store.run_dir import read_recipe

BATCH = 32
RECIPES = (("fp16", ""), ("bf16", ""), ("int8", "fp32"), ("int8", "fp16"), ("fp8", "fp16"))

Array = np.ndarray[Any, np.dtype[Any]]


def with_outliers(model: ModelProto, seed: int = 0) -> ModelProto:
    """The same function with two channels of every LayerNorm 30 to 100 times as large; its readers take that back."""
    model, random = prepared(model), np.random.default_rng(seed)
    paths = ChannelPaths(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def scale(name: str, by: Array) -> None:
        values = (numpy_helper.to_array(tensors[name]) * by).astype(np.float32)
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))

    for norm in [node for node in model.graph.node if node.op_type == "LayerNormalization"]:
        readers = paths.readers(norm.output[0], len(paths.shape(norm.output[0])) - 1)
        channels = tensors[norm.input[1]].dims[0]
        factor = np.ones(channels)
        factor[random.choice(channels, 2, replace=False)] = random.uniform(30, 100, 2)
        for name in norm.input[1:] if readers else ():
            scale(name, factor)
        for layer in readers:
            rank = len(tensors[layer.weight].dims)
            scale(layer.weight, 1 / factor.reshape([-1 if axis == layer.in_axis else 1 for axis in range(rank)]))
    return model


def without_fold(model: ModelProto, ranges: Ranges) -> ModelProto:
    """int8, the rest fp16, with nothing done about outliers."""
    ready = prepared(model)
    return to_half(quantize(ready, ranges, "int8", quantizable_layers(ready, "int8")), "fp16")


def measure_run(run: Path, calib_images: int, eval_images: int, quiet: bool) -> Iterator[dict[str, Any]]:
    """Rows for both networks of a run."""
    source = open_data(read_recipe(run)["data"])
    preprocess = toolchain.preprocess_of(toolchain.load(run / "3-distill/model"))
    calibration = [
        images.numpy() for images in torch.split(proxy_images(source, preprocess, calib_images, 0).read(), 8)
    ]
    for network in ("dense", "pruned"):
        plain = load_model(run / "4-export" / network / "model.onnx")
        for outliers, model in ((False, plain), (True, with_outliers(plain))):
            ranges = calibrate(model, calibration, quiet=quiet)
            graphs = {
                f"{p}{f' ({base})' if base else ''}": convert(
                    model, p, ranges=ranges, base_precision=base or "fp16"
                ).model
                for p, base in RECIPES
            }
            graphs["int8 (fp16), no fold"] = without_fold(model, ranges)
            for name, found in _judge(model, graphs, source, preprocess, eval_images, quiet).items():
                yield {
                    "run": run.name, "network": network, "outliers": outliers, "precision": name, "top1": found.top1,
                    "drop": found.drop, "agreement": found.agreement, "sqnr_db": found.sqnr_db, "images": found.images,
                }  # fmt: skip


def _judge(
    fp32: ModelProto,
    graphs: dict[str, ModelProto],
    source: DataSource,
    preprocess: Preprocess,
    images: int,
    quiet: bool,
) -> dict[str, Accuracy]:
    sessions = {"fp32": open_model(fp32), **{name: open_model(for_cpu(graph)) for name, graph in graphs.items()}}
    chosen = batches(validation_images(source, images), preprocess, BATCH)
    fed = ((x.numpy(), labels.numpy()) for x, labels in chosen)
    outputs, labels = outputs_of(sessions, fed, BATCH, quiet=quiet)
    return {name: accuracy(outputs["fp32"], outputs[name], labels, name) for name in sessions}


def table(rows: list[dict[str, Any]]) -> Table:
    """For the terminal."""
    shown = Table("run", "network", "outliers", "precision", "top-1 %", "drop", "SQNR dB")
    for row in rows:
        top1 = "" if row["top1"] is None else f"{row['top1']:.2f}"
        planted = "planted" if row["outliers"] else ""
        shown.add_row(
            row["run"], row["network"], planted, row["precision"], top1, f"{row['drop']:.2f}", f"{row['sqnr_db']:.1f}"
        )
    return shown


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--calib-images", type=int, default=128)
    parser.add_argument("--eval-images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/precision.json"))
    parser.add_argument("--quiet", action="store_true")
    asked = parser.parse_args()
    rows = [row for run in asked.runs for row in measure_run(run, asked.calib_images, asked.eval_images, asked.quiet)]
    document = {
        "date": date.today().isoformat(),
        "environment": environment().as_json(),
        "calib_images": asked.calib_images,
        "rows": rows,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(document, indent=1) + "\n")
    Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
