"""A small run of one network, put together for hand-over."""

import functools
import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tomli_w

from tests.deploy.conftest import Exported
from upvits import toolchain
from upvits.deploy.measure.document import Best, Latency
from upvits.deploy.report.document import AccuracyFigures, EngineFigures, ModelFigures, PrunedFigures, Report
from upvits.deploy.runtimes import BuildOptions, read_engine, runtime_named
from upvits.deploy.runtimes.engine_folder import save_engine
from upvits.deploy.runtimes.interface import Engine
from upvits.deploy.store.artifacts import atomic_write, run_stage

LABELS = ("shirt", "shoe", "hat", "coat", "dress", "sock", "scarf")
WEIGHTS = "/home/some body & co/weights.safetensors"
DATA = "imagefolder:/srv/photos of mine/shop"


def latency(ms: float) -> Latency:
    return Latency(
        min=ms, median=ms, mean=ms, p90=ms, p95=ms, p99=ms, cv=0.01, images_per_s=1e3 / ms, n=40, unstable=False
    )


def report_of(engines: list[tuple[Engine, str]], measured: dict[str, float], best: list[Best]) -> Report:
    """A report of these engines, those of ONNX Runtime measured in the precisions `measured`."""
    times = {"onnxruntime": {name: {"b1": latency(ms)} for name, ms in measured.items()}}
    dense = {"onnxruntime": {name: {"b1": latency(2 * ms)} for name, ms in measured.items()}}
    return Report(
        model="deit_tiny",
        ratio=0.5,
        data=DATA,
        weights=WEIGHTS,
        dense=ModelFigures(params=5_000_000, macs=9_000_000, top1=91.5, latency_ms=dense),
        pruned=PrunedFigures(
            params=2_000_000, macs=3_000_000, top1=90.25, latency_ms=times, top1_after_prune=40.5, agreement=97.0
        ),
        speedup={"onnxruntime": {name: {"b1": 2.0} for name in measured}},
        best=best,
        engines=[
            EngineFigures(
                model="pruned",
                runtime=engine.runtime,
                precision=engine.precision,
                target=", ".join(engine.targets) or "any",
                path=path,
                bytes=engine.bytes,
                seconds=1.0,
            )
            for engine, path in engines
        ],
        environment={"cpu": "a processor", "python": "3.11.7", "libraries": {"numpy": "2.4.6"}},
        measurement={"accuracy": "top-1 on 80 validation images"},
        accuracy=[
            AccuracyFigures(
                model="pruned",
                runtime="onnxruntime",
                precision="int8",
                images=80,
                top1=90.0,
                agreement=98.75,
                drop=0.25,
                sqnr_db=33.3,
                measured_on="the engine itself",
                calibration_images=64,
                calibration_digest=4 * "0123456789abcdef",
                calibration_method="max",
            )
        ],
        notes=["tensorrt was left out: it is not installed."],
    )


BEST = Best(
    runtime="onnxruntime", precision="fp32", batch=1, dense_precision="fp32",
    dense_ms=4.0, pruned_ms=2.0, speedup=2.0, low=1.9, high=2.1, passed_over={"int8": "It is slower."},
)  # fmt: skip

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def parts(vit: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages of a run made of one small network: its model folder, ONNX file and engine."""
    folder = tmp_path_factory.mktemp("parts")
    model: Any = vit.model
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "mean": vit.preprocess.mean, "std": vit.preprocess.std, "crop_pct": 0.9, "label_names": LABELS,
    }  # fmt: skip
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    toolchain.save(vit.model, folder / "3-distill/model", model_args=arguments)
    proto = onnx.load(vit.report.path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props} | {"labels": json.dumps(LABELS)}
    onnx.helper.set_model_props(proto, metadata)
    target = folder / "4-export/pruned/model.onnx"
    target.parent.mkdir(parents=True)
    onnx.save(proto, target)
    runtime_named("onnxruntime").build(target, folder / "5-engine/onnxruntime-fp32/pruned", BuildOptions())
    return folder


@pytest.fixture
def make_run(parts: Path, tmp_path: Path) -> MakeRun:
    """Put a run directory together: real stages around the parts, and engines that no machine here could build."""

    def make(others: tuple[tuple[str, str, tuple[str, ...]], ...] = (), **figures: Any) -> Path:
        run = tmp_path / "runs" / "shop"
        run.mkdir(parents=True)
        onnx_path = parts / "4-export/pruned/model.onnx"
        for name in ("3-distill", "4-export", "5-engine/onnxruntime-fp32"):
            copy = functools.partial(shutil.copytree, parts / name, dirs_exist_ok=True)
            run_stage(run, name, {}, {}, copy)
        engines = [("onnxruntime", "fp32")]
        for runtime, precision, targets in others:
            cuda = {"provider": "CUDAExecutionProvider", "use_tf32": "0"}
            tensorrt = {"provider": "TensorrtExecutionProvider", "trt_fp16_enable": "0"}
            ours = {
                "onnxruntime": {"provider": "CPUExecutionProvider"},
                "onnxruntime-cuda": cuda, "onnxruntime-tensorrt": tensorrt,
            }.get(runtime, {})  # fmt: skip
            library = "onnxruntime" if ours else runtime
            write = functools.partial(
                save_engine, runtime_named(runtime),
                content=onnx_path.read_bytes() if library != runtime else b"a plan", targets=targets,
                file="model.onnx" if library == "onnxruntime" else "engine.plan",
                options=BuildOptions(precision=precision), seconds=1.0, library=library,
                library_version="1.2.3", onnx_path=onnx_path, settings=ours,
            )  # fmt: skip
            run_stage(run, f"5-engine/{runtime}-{precision}", {}, {}, lambda folder, w=write: w(folder / "pruned"))  # type: ignore[misc]
            engines.append((runtime, precision))
        read = [(read_pruned(run, *names), f"5-engine/{'-'.join(names)}/pruned/model.onnx") for names in engines]
        report = report_of(read, figures.get("measured", {"fp32": 2.0}), figures.get("best", [BEST]))
        recipe = {"model": "deit_tiny", "weights": WEIGHTS, "data": DATA, "plan": {"ratio": 0.5}}
        atomic_write(run / "recipe.toml", tomli_w.dumps(recipe).encode())
        atomic_write(run / "report.json", report.model_dump_json(indent=2).encode())
        atomic_write(run / "report.html", f"<p>made of {html.escape(WEIGHTS)} in {run}</p>".encode())
        return run

    return make


def read_pruned(run: Path, runtime: str, precision: str) -> Engine:
    return read_engine(run / f"5-engine/{runtime}-{precision}" / "pruned")
