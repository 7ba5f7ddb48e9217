"""The command line. It turns options into a recipe, calls the pipeline, and prints what came out."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from upvits.calib_data.errors import UserError
from upvits.deploy.cli import options as opt
from upvits.deploy.cli.detect import app as detect_app
from upvits.deploy.cli.values import input_shape_of, numbers, recipe_values, split, whole_numbers

app = typer.Typer(
    name="upvits-deploy",
    help="Turn a trained vision transformer into a smaller one that is faster on your hardware, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(detect_app, name="detect")

_INTERRUPTED = 130  # what typer makes of Ctrl-C
_TERMINATED = 128 + signal.SIGTERM


def _stage_command(until: str) -> Callable[..., None]:
    """A command that runs the pipeline up to one stage; all of them take the same options."""

    def command(
        model: opt.Model = None,
        weights: opt.Weights = None,
        data: opt.Data = None,
        image_size: opt.ImageSize = None,
        ratio: opt.Ratio = None,
        target_macs: opt.TargetMacs = None,
        target_params: opt.TargetParams = None,
        like: opt.Like = None,
        target_latency: opt.TargetLatency = None,
        speedup: opt.Speedup = None,
        depth_ratio: opt.DepthRatio = None,
        planner: opt.Planner = None,
        rounds: opt.Rounds = None,
        compensate: opt.Compensate = None,
        refit_images: opt.RefitImages = None,
        align: opt.Align = None,
        components: opt.Components = None,
        method: opt.Method = None,
        proxy_images: opt.ProxyImages = None,
        epochs: opt.Epochs = None,
        batch_size: opt.BatchSize = None,
        lr: opt.Lr = None,
        feature_weight: opt.FeatureWeight = None,
        workers: opt.Workers = None,
        device: opt.Device = None,
        runtime: opt.Runtime = None,
        precision: opt.Precision = None,
        max_drop: opt.MaxDrop = None,
        calib: opt.Calib = None,
        calib_images: opt.CalibImages = None,
        batch_profile: opt.BatchProfileOption = None,
        targets: opt.Targets = None,
        workspace: opt.Workspace = None,
        require_fused: opt.RequireFused = None,
        opset: opt.Opset = None,
        uint8_input: opt.Uint8 = None,
        external_data: opt.ExternalData = None,
        bench_batches: opt.BenchBatches = None,
        bench_seconds: opt.BenchSeconds = None,
        streams: opt.Streams = None,
        cuda_graph: opt.CudaGraph = None,
        detect: opt.Detect = None,
        output: opt.Output = None,
        recipe: opt.RecipeFile = None,
        seed: opt.Seed = None,
        quiet: opt.Quiet = False,
    ) -> None:
        options = {
            "model": model, "weights": weights, "data": data, "image_size": image_size, "ratio": ratio,
            "target_macs": target_macs, "target_params": target_params, "like": like,
            "target_latency": target_latency, "speedup": speedup, "depth_ratio": depth_ratio, "planner": planner,
            "rounds": rounds, "enabled": compensate, "refit_images": refit_images, "align": align,
            "components": split(components), "method": method, "num_images": proxy_images, "epochs": epochs,
            "batch_size": batch_size, "lr": lr, "feature_weight": feature_weight, "workers": workers,
            "device": device, "runtime": runtime, "precision": precision, "max_drop": max_drop, "calib": calib,
            "calib_images": calib_images, "batch": batch_profile, "targets": split(targets),
            "workspace_mib": workspace, "require_fused_attention": require_fused, "opset": opset,
            "uint8_input": uint8_input, "external_data": external_data,
            "batches": whole_numbers(bench_batches, "Batch sizes", "--bench-batches"), "seconds": bench_seconds,
            "streams": whole_numbers(streams, "Streams", "--streams"), "cuda_graph": cuda_graph, "coco": detect,
            "recipe": recipe, "seed": seed,
        }  # fmt: skip
        _run(recipe_values(options), output, until, quiet)

    return command


def _run(values: dict[str, Any], output: Path | None, until: str, quiet: bool) -> None:
    from upvits.deploy.cli.plan_view import plan_table
    from upvits.deploy.pipeline import prepare, preview, require_target, run_job
    from upvits.deploy.recipe.document import make_recipe
    from upvits.deploy.report.views import terminal

    console = Console(quiet=quiet)
    if until == "plan":
        Console().print(plan_table(*preview(make_recipe(values), quiet=quiet)))
        return
    job = prepare(make_recipe(values), output, quiet=quiet)
    report = run_job(job, until)
    if report is not None:
        console.print(terminal(report))
    console.print(f"Everything is in {job.folder}", soft_wrap=True, highlight=False, markup=False)
    if report is not None:
        require_target(report)


_HELP = {
    "build": ("report", "The main job: score, prune, distill, export, build engines, measure, report."),
    "score": ("score", "Run up to the importance of every unit."),
    "plan": ("plan", "Print what would be cut; write nothing."),
    "prune": ("prune", "Run up to the pruned network (before fine-tuning)."),
    "distill": ("distill", "Run up to the fine-tuned network."),
    "export": ("export", "Run up to the ONNX files, checked against PyTorch."),
    "quantize": ("precision", "Run up to the graphs of every precision, and what each costs."),
    "engine": ("engine", "Run up to the engines."),
}
for _name, (_until, _text) in _HELP.items():
    app.command(_name, help=_text)(_stage_command(_until))


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX files, engine folders or runs, ours or not.")],
    runtime: opt.Runtime = None,
    batches: Annotated[str, typer.Option("--batches", "--batch", help="Batch sizes to time.")] = "1",
    seconds: Annotated[float, typer.Option(help="Seconds per batch size.")] = 5.0,
    streams: Annotated[str, typer.Option(help="Sessions at once, e.g. 1,4.")] = "1",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every CPU session.")] = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay recorded work on GPUs.")] = False,
    input_shape: Annotated[
        list[str] | None, typer.Option(help="NAME=1x3x224x224, for axes that the file leaves open.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Compare the latency of any models in turns: the first is what the others are held against."""
    from upvits.deploy.measure.compare import check_output, compare, comparison_table
    from upvits.deploy.store.artifacts import atomic_write, disk_errors

    if output is not None:
        check_output(output, models)
    found = compare(
        models,
        runtimes=runtime or "auto",
        batches=whole_numbers(batches, "Batch sizes", "--batches") or [1],
        seconds=seconds,
        streams=whole_numbers(streams, "Streams", "--streams") or [1],
        threads=threads,
        cuda_graph=cuda_graph,
        input_shapes=dict(input_shape_of(text) for text in input_shape or ()),
        quiet=quiet,
    )
    if output is not None:
        with disk_errors(output.parent, "bench"):
            atomic_write(output, found.model_dump_json(indent=2).encode())
    Console(quiet=quiet).print(comparison_table(found))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.")],
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write a comparison (HTML, JSON beside it).")
    ] = None,
) -> None:
    """Show the report of a run and write its pages again from report.json; or compare several runs."""
    from upvits.deploy.report.document import load_report
    from upvits.deploy.report.runs import check_place, compare_runs, comparison_terminal, save_comparison
    from upvits.deploy.report.views import save_report, terminal
    from upvits.deploy.store.artifacts import disk_errors

    if output is not None and len(runs) < 2:
        raise UserError(
            "--output is for comparisons of several runs.",
            why="The pages of a run lie in the run; this command writes them there again.",
            fix="Name two or more runs, or leave --output out.",
        )
    if output is not None:
        check_place(output)
    if len(runs) > 1:
        compared = compare_runs({str(run): load_report(run) for run in runs})
        if output is not None:
            with disk_errors(output.parent, "report"):
                save_comparison(output, compared)
        if json:
            print(compared.model_dump_json(indent=2))
        else:
            Console().print(comparison_terminal(compared))
        return
    found = load_report(runs[0])
    if json:
        print(found.model_dump_json(indent=2))
        return
    with disk_errors(runs[0], "report"):
        save_report(runs[0], found)
    Console().print(terminal(found))


@app.command()
def sweep(
    model: opt.Model = None,
    ratios: Annotated[str | None, typer.Option(help="Shares of every dimension to remove, e.g. 0.3,0.5,0.7.")] = None,
    macs: Annotated[str | None, typer.Option(help="Shares of the MACs to keep, e.g. 0.65,0.5,0.35.")] = None,
    speedups: Annotated[str | None, typer.Option(help="Factors, e.g. 1.5x,2x,3x (planner latency).")] = None,
    latencies: Annotated[str | None, typer.Option(help="Per batch, e.g. 2ms,3ms (planner latency).")] = None,
    weights: opt.Weights = None,
    data: opt.Data = None,
    image_size: opt.ImageSize = None,
    planner: opt.Planner = None,
    method: opt.Method = None,
    depth_ratio: opt.DepthRatio = None,
    rounds: opt.Rounds = None,
    align: opt.Align = None,
    components: opt.Components = None,
    compensate: opt.Compensate = None,
    refit_images: opt.RefitImages = None,
    proxy_images: opt.ProxyImages = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    device: opt.Device = None,
    runtime: opt.Runtime = None,
    precision: opt.Precision = None,
    max_drop: opt.MaxDrop = None,
    bench_batches: opt.BenchBatches = None,
    bench_seconds: opt.BenchSeconds = None,
    recipe: opt.RecipeFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the runs. \\[default: runs/MODEL-sweep]")
    ] = None,
    seed: opt.Seed = None,
    quiet: opt.Quiet = False,
) -> None:
    """Run the main job for several cuts and plot accuracy over latency; other settings come from --recipe."""
    from upvits.deploy.sweep import sweep as run_sweep
    from upvits.deploy.sweep import sweep_terminal

    options = {
        "model": model, "weights": weights, "data": data, "image_size": image_size, "planner": planner,
        "method": method, "depth_ratio": depth_ratio, "rounds": rounds, "align": align,
        "components": split(components), "enabled": compensate, "refit_images": refit_images,
        "num_images": proxy_images, "epochs": epochs, "batch_size": batch_size, "device": device, "runtime": runtime,
        "precision": precision, "max_drop": max_drop,
        "batches": whole_numbers(bench_batches, "Batch sizes", "--bench-batches"), "seconds": bench_seconds,
        "recipe": recipe, "seed": seed,
    }  # fmt: skip
    cuts: list[dict[str, Any]] = [
        *({"ratio": number} for number in numbers(ratios, "--ratios") or ()),
        *({"target_macs": number} for number in numbers(macs, "--macs") or ()),
        *({"speedup": part} for part in split(speedups) or ()),
        *({"target_latency": part} for part in split(latencies) or ()),
    ]
    values = recipe_values(options)
    found = run_sweep(values, cuts, output or Path("runs") / f"{values['model']}-sweep", quiet=quiet)
    Console(quiet=quiet).print(sweep_terminal(found))
    failed = [run.exit_code for run in found.runs if run.exit_code]
    if failed:
        raise typer.Exit(failed[0])


@app.command()
def package(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to make. \\[default: RUN-package]")
    ] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Make a folder that runs without this tool: model, engines, examples, model card, Triton repository."""
    from upvits.deploy.handover.package import package as make

    folder = make(run, output, quiet=quiet)
    Console(quiet=quiet).print(f"Everything is in {folder}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="Part of the name.")] = "") -> None:
    """List the timm models that can be pruned."""
    from upvits.toolchain.networks.models import supported

    for name in supported(pattern):
        print(name)


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing for which feature, and how to get it."""
    from upvits.deploy.machine.doctor import doctor as examine
    from upvits.deploy.machine.doctor import render

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
        with _terminated_cleanly():
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
            continues = sys.argv[1:2] and sys.argv[1] in {*_HELP, "sweep"} - {"plan"}
            print("Interrupted. The same command continues." if continues else "Interrupted.", file=sys.stderr)
        raise


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM end the process as an exception, so that temporary folders are removed."""
    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main one
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
