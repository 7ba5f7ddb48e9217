"""Options of the command line, as typer reads them; `deploy/cli/app.py` says which command takes which."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLAN, TRAIN, ENGINE, BENCH, RUN = "What is cut", "Fine-tuning", "Engines", "Measuring", "Run"

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="timm name, e.g. pvtv2_b0 or deit_tiny (see `models`).")
]
Weights = Annotated[
    str | None, typer.Option(help="Checkpoint file, model folder, timm (hub), random, or demo. \\[default: demo]")
]
Data = Annotated[
    str | None,
    typer.Option(help="imagefolder:DIR, hfds:NAME, wds:DIR, torch:NAME, or demo. \\[default: demo]"),
]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels. \\[default: the model's]")]
Ratio = Annotated[
    float | None, typer.Option("--ratio", "-r", help="Share of every dimension to remove.", rich_help_panel=PLAN)
]
TargetMacs = Annotated[float | None, typer.Option(help="Share of the MACs to keep.", rich_help_panel=PLAN)]
TargetParams = Annotated[float | None, typer.Option(help="Share of the parameters to keep.", rich_help_panel=PLAN)]
Like = Annotated[
    str | None, typer.Option(help="Depth, widths and heads of this smaller published model.", rich_help_panel=PLAN)
]
TargetLatency = Annotated[
    str | None, typer.Option(help="Milliseconds per batch, e.g. 2.0ms, measured here.", rich_help_panel=PLAN)
]
Speedup = Annotated[
    str | None, typer.Option(help="Against the dense model, e.g. 2x, measured here.", rich_help_panel=PLAN)
]
DepthRatio = Annotated[
    float | None,
    typer.Option(help="Share of the blocks to remove, also beside --ratio; planner uniform.", rich_help_panel=PLAN),
]
Planner = Annotated[
    str | None,
    typer.Option(
        help="uniform, global or latency. \\[default: uniform; latency where one is asked for]", rich_help_panel=PLAN
    ),
]
Rounds = Annotated[
    int | None, typer.Option(help="Prune in steps, scoring again in between. \\[default: 1]", rich_help_panel=PLAN)
]
Compensate = Annotated[
    bool | None,
    typer.Option(
        "--compensate/--no-compensate",
        help="Rotate and refit. \\[default: on with enough images]",
        rich_help_panel=PLAN,
    ),
]
RefitImages = Annotated[int | None, typer.Option(help="Images to refit on. \\[default: 512]", rich_help_panel=PLAN)]
Align = Annotated[int | None, typer.Option(help="Widths are multiples of this. \\[default: 8]", rich_help_panel=PLAN)]
Components = Annotated[
    str | None,
    typer.Option(
        help="Some of embed, ffn, depth (not uniform), and attention or qk_v or heads. "
        "\\[default: embed,attention,ffn, and depth unless uniform]",
        rich_help_panel=PLAN,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(help="Scores: fisher, refined, kl, magnitude, random. \\[default: fisher]", rich_help_panel=PLAN),
]
ProxyImages = Annotated[
    int | None, typer.Option(help="Images to score on. \\[default: 1024; 256 on the demo]", rich_help_panel=PLAN)
]
Epochs = Annotated[int | None, typer.Option(help="0 skips. \\[default: 2 on the demo, else 30]", rich_help_panel=TRAIN)]
BatchSize = Annotated[int | None, typer.Option(help="\\[default: 256; 32 below 20,000 images]", rich_help_panel=TRAIN)]
Lr = Annotated[
    float | None,
    typer.Option(
        help="Peak rate at batch 256. \\[default: 1e-3; 4e-3 for few images]",
        rich_help_panel=TRAIN,
    ),
]
FeatureWeight = Annotated[
    float | None,
    typer.Option(help="Weight of feature distillation. \\[default: 20 for PVTv2, else 0]", rich_help_panel=TRAIN),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Reading processes. \\[default: 0; on GPUs up to 8]", rich_help_panel=TRAIN),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda. \\[default: auto]", rich_help_panel=TRAIN)]
Runtime = Annotated[
    str | None,
    typer.Option(help="onnxruntime, tensorrt-rtx, ... \\[default: auto]", rich_help_panel=ENGINE),
]
Precision = Annotated[
    str | None,
    typer.Option(help="Some of fp32,fp16,bf16,int8,fp8. \\[default: what suits the runtime]", rich_help_panel=ENGINE),
]
MaxDrop = Annotated[
    float | None, typer.Option(help="Points that a precision may cost. \\[default: 0.5]", rich_help_panel=ENGINE)
]
Calib = Annotated[
    str | None,
    typer.Option(help="Images to calibrate on, like --data. \\[default: those of --data]", rich_help_panel=ENGINE),
]
CalibImages = Annotated[int | None, typer.Option(help="How many. \\[default: 256]", rich_help_panel=ENGINE)]
BatchProfileOption = Annotated[
    str | None,
    typer.Option("--batch", "--batch-profile", help="min:opt:max. \\[default: 1:8:32]", rich_help_panel=ENGINE),
]
Workspace = Annotated[int | None, typer.Option(help="Most scratch memory, MiB.", rich_help_panel=ENGINE)]
RequireFused = Annotated[
    bool | None,
    typer.Option("--require-fused-attention", help="Refuse engines with attention in pieces.", rich_help_panel=ENGINE),
]
ExternalData = Annotated[
    bool | None,
    typer.Option("--save-external-data", help="ONNX weights in a file of their own.", rich_help_panel=ENGINE),
]
Targets = Annotated[
    str | None,
    typer.Option(help="GPU targets, e.g. sm86,sm120. \\[default: the runtime's]", rich_help_panel=ENGINE),
]
Opset = Annotated[int | None, typer.Option(help="18 to 23. \\[default: 20]", rich_help_panel=ENGINE)]
Uint8 = Annotated[
    bool | None,
    typer.Option("--uint8-input", help="Raw NHWC pixels as input, normalised in the graph.", rich_help_panel=ENGINE),
]
BenchBatches = Annotated[str | None, typer.Option(help="Batch sizes to time. \\[default: 1,8]", rich_help_panel=BENCH)]
BenchSeconds = Annotated[
    float | None, typer.Option(help="Seconds per batch size and pair. \\[default: 6]", rich_help_panel=BENCH)
]
Streams = Annotated[str | None, typer.Option(help="Sessions at once, e.g. 1,4. \\[default: 1]", rich_help_panel=BENCH)]
CudaGraph = Annotated[
    bool | None, typer.Option("--cuda-graph", help="Replay recorded work on GPUs.", rich_help_panel=BENCH)
]
Detect = Annotated[
    str | None,
    typer.Option("--detect", help="Detectors too, on this COCO folder or demo.", rich_help_panel=RUN),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run directory. \\[default: runs/MODEL-CUT]", rich_help_panel=RUN)
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Values from this TOML file.", rich_help_panel=RUN)]
Seed = Annotated[int | None, typer.Option(help="\\[default: 0]", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report.", rich_help_panel=RUN)]
