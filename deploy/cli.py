"""The command line. It turns options into a recipe, calls the pipeline, and prints what came out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from calib_data.errors import UserError

app = typer.Typer(
    name="upvits-deploy",
    help="Turn a trained vision transformer into a smaller one that is faster on your hardware, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_INTERRUPTED = 130  # what typer makes of Ctrl-C
PLAN, TRAIN, ENGINE, BENCH, RUN = "What is cut", "Fine-tuning", "Engines", "Measuring", "Run"

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="timm name, e.g. pvtv2_b0 or deit_tiny (see `models`).")
]
Weights = Annotated[
    str | None, typer.Option(help="Checkpoint file, model folder, timm (hub), random, or demo. \\[default: demo]")
]
Data = Annotated[
    str | None,
    typer.Option(help="imagefolder:DIR, hfds/NAME, wds/PATH, torch/NAME, or demo. \\[default: demo]"),
]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels. \\[default: the model's]")]
Ratio = Annotated[
    float | None, typer.Option("--ratio", "-r", help="Share of every dimension to remove.", rich_help_panel=PLAN)
]
TargetMacs = Annotated[float | None, typer.Option(help="Share of the MACs to keep.", rich_help_panel=PLAN)]
TargetParams = Annotated[float | None, typer.Option(help="Share of the parameters to keep.", rich_help_panel=PLAN)]
Like = Annotated[
    str | None, typer.Option(help="Widths and heads of this smaller published model.", rich_help_panel=PLAN)
]
Align = Annotated[int | None, typer.Option(help="Widths are multiples of this. \\[default: 8]", rich_help_panel=PLAN)]
Components = Annotated[
    str | None,
    typer.Option(help="Some of embed, attention or heads, ffn. \\[default: embed,attention,ffn]", rich_help_panel=PLAN),
]
Method = Annotated[
    str | None,
    typer.Option(help="Scores: fisher, kl, magnitude, random. \\[default: fisher]", rich_help_panel=PLAN),
]
ProxyImages = Annotated[
    int | None, typer.Option(help="Images to score on. \\[default: 1024; 256 on the demo]", rich_help_panel=PLAN)
]
Epochs = Annotated[int | None, typer.Option(help="0 skips. \\[default: 3 on the demo, else 30]", rich_help_panel=TRAIN)]
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
    typer.Option(help="fp32, fp16. \\[default: fp32 on CPUs, else fp16]", rich_help_panel=ENGINE),
]
BatchProfileOption = Annotated[
    str | None, typer.Option("--batch-profile", help="min:opt:max. \\[default: 1:8:32]", rich_help_panel=ENGINE)
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
    float | None, typer.Option(help="Seconds per batch size. \\[default: 10]", rich_help_panel=BENCH)
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run directory. \\[default: runs/MODEL-CUT]", rich_help_panel=RUN)
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Values from this TOML file.", rich_help_panel=RUN)]
Seed = Annotated[int | None, typer.Option(help="\\[default: 0]", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report.", rich_help_panel=RUN)]


def recipe_values(options: dict[str, Any]) -> dict[str, Any]:
    """Nested recipe values from the options that were given; a recipe file's values stand below them."""
    from deploy.recipe import read_recipe_file

    places = {
        "plan": ("ratio", "target_macs", "target_params", "like", "align", "components"),
        "score": ("method", "num_images"),
        "distill": ("epochs", "batch_size", "lr", "feature_weight", "workers"),
        "engine": ("runtime", "precision", "batch", "targets"),
        "export": ("opset", "uint8_input"),
        "bench": ("batches", "seconds"),
    }
    file = options.pop("recipe")
    values: dict[str, Any] = {} if file is None else read_recipe_file(file)
    given = {name: value for name, value in options.items() if value is not None}
    for part, names in places.items():
        chosen = {name: given.pop(name) for name in names if name in given}
        if chosen:
            if not isinstance(values.get(part, {}), dict):
                raise UserError(f"The recipe has {part} = {values[part]!r}.", fix=f"Make it a table: [{part}].")
            values[part] = {**values.get(part, {}), **chosen}
    values |= given
    if "model" not in values:
        raise UserError("Which model?", fix="Give --model, e.g. --model pvtv2_b0 --ratio 0.5.")
    return values


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _whole_numbers(text: str | None) -> list[int] | None:
    parts = _split(text)
    if parts is None:
        return None
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"Batch sizes {text!r} are not valid.", fix="Give them like --bench-batches 1,8.")
    return [int(part) for part in parts]


def _stage_command(until: str) -> Callable[..., None]:
    """A command that runs the pipeline up to one stage; all of them take the same options."""

    def command(
        model: Model = None,
        weights: Weights = None,
        data: Data = None,
        image_size: ImageSize = None,
        ratio: Ratio = None,
        target_macs: TargetMacs = None,
        target_params: TargetParams = None,
        like: Like = None,
        align: Align = None,
        components: Components = None,
        method: Method = None,
        proxy_images: ProxyImages = None,
        epochs: Epochs = None,
        batch_size: BatchSize = None,
        lr: Lr = None,
        feature_weight: FeatureWeight = None,
        workers: Workers = None,
        device: Device = None,
        runtime: Runtime = None,
        precision: Precision = None,
        batch_profile: BatchProfileOption = None,
        targets: Targets = None,
        opset: Opset = None,
        uint8_input: Uint8 = None,
        bench_batches: BenchBatches = None,
        bench_seconds: BenchSeconds = None,
        output: Output = None,
        recipe: RecipeFile = None,
        seed: Seed = None,
        quiet: Quiet = False,
    ) -> None:
        options = {
            "model": model, "weights": weights, "data": data, "image_size": image_size, "ratio": ratio,
            "target_macs": target_macs, "target_params": target_params, "like": like, "align": align,
            "components": _split(components), "method": method, "num_images": proxy_images, "epochs": epochs,
            "batch_size": batch_size, "lr": lr, "feature_weight": feature_weight, "workers": workers,
            "device": device, "runtime": runtime, "precision": precision, "batch": batch_profile,
            "targets": _split(targets), "opset": opset, "uint8_input": uint8_input,
            "batches": _whole_numbers(bench_batches), "seconds": bench_seconds, "recipe": recipe, "seed": seed,
        }  # fmt: skip
        _run(recipe_values(options), output, until, quiet)

    return command


def _run(values: dict[str, Any], output: Path | None, until: str, quiet: bool) -> None:
    from deploy.pipeline import prepare, preview, run_job
    from deploy.plan_view import plan_table
    from deploy.recipe import make_recipe
    from deploy.report_views import terminal

    console = Console(quiet=quiet)
    if until == "plan":
        Console().print(plan_table(preview(make_recipe(values))))
        return
    job = prepare(make_recipe(values), output, quiet=quiet)
    report = run_job(job, until)
    if report is not None:
        console.print(terminal(report))
    console.print(f"Everything is in {job.folder}", soft_wrap=True, highlight=False, markup=False)


_HELP = {
    "build": ("report", "The main job: score, prune, distill, export, build engines, measure, report."),
    "score": ("score", "Run up to the importance of every unit."),
    "plan": ("plan", "Print what would be cut; write nothing."),
    "prune": ("prune", "Run up to the pruned network (before fine-tuning)."),
    "distill": ("distill", "Run up to the fine-tuned network."),
    "export": ("export", "Run up to the ONNX files, checked against PyTorch."),
    "engine": ("engine", "Run up to the engines."),
    "bench": ("bench", "Run up to the latency measurements."),
}
for _name, (_until, _text) in _HELP.items():
    app.command(_name, help=_text)(_stage_command(_until))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
) -> None:
    """Show the report of a run, and write report.md and report.html again from report.json."""
    from deploy.artifacts import disk_errors
    from deploy.report import load_report
    from deploy.report_views import save_report, terminal

    found = load_report(run)
    if json:
        print(found.model_dump_json(indent=2))
        return
    with disk_errors(run, "report"):
        save_report(run, found)
    Console().print(terminal(found))


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="Part of the name.")] = "") -> None:
    """List the timm models that can be pruned."""
    from toolchain.models import supported

    for name in supported(pattern):
        print(name)


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing for which feature, and how to get it."""
    from deploy.doctor import doctor as examine
    from deploy.doctor import render

    Console().print(render(examine()))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"upvits-deploy {version('upvits-deploy')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake ends with a message and its exit code, not with a traceback."""
    try:
        app()
    except UserError as error:
        console = Console(stderr=True)
        console.print("[bold red]Error:[/]", end=" ")
        console.print(error.what, soft_wrap=True, highlight=False, markup=False)
        for text in (error.why, error.fix):
            if text:
                console.print(f"  {text}", soft_wrap=True, highlight=False, markup=False)
        sys.exit(error.exit_code)
    except SystemExit as error:
        if error.code == _INTERRUPTED:
            print("Interrupted. The same command continues.", file=sys.stderr)
        raise
