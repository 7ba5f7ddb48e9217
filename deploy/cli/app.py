"""The command line. It turns options into a recipe, calls the pipeline, and prints what came out."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import typer

from upvits.calib_data.errors import StoppedError, UserError
from upvits.deploy.cli import options as opt
from upvits.deploy.cli.arguments import options_of, refuse_empty
from upvits.deploy.cli.console import console, prepare_streams, print_json, print_place
from upvits.deploy.cli.detect import app as detect_app
from upvits.deploy.cli.distill import distill
from upvits.deploy.cli.failures import exit_code_of, exit_code_of_output, require_address_space, require_working_folder
from upvits.deploy.cli.log import show_log
from upvits.deploy.cli.look import inspect, predict
from upvits.deploy.cli.quick import leave_out_compiler
from upvits.deploy.cli.settings import Values, settings_of, split, takes, whole_numbers
from upvits.deploy.cli.several import follow, is_first, lead
from upvits.deploy.cli.values import asked_job, input_shape_of, numbers, recipe_values
from upvits.deploy.recipe.document import CUTS, Recipe
from upvits.deploy.recipe.setting import PLAN, RUN
from upvits.toolchain.processes.launchers import number_of_processes

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

_SETTINGS = settings_of(Recipe)
_SWEPT = [setting for path, setting in _SETTINGS.items() if path.removeprefix("plan.") not in CUTS]
_COMPARED = [_SETTINGS[path] for path in ("engine.runtime", "bench.streams", "bench.cuda_graph")]


def _stage_command(until: str) -> Callable[..., None]:
    """A command that runs the pipeline up to one stage; all of them take the same options."""

    @takes(given=_SETTINGS.values())
    def command(
        *,
        given: Values,
        recipe: opt.RecipeFile = None,
        output: opt.Output = None,
        quiet: opt.Quiet = False,
        verbose: opt.Verbose = False,
    ) -> None:
        from upvits.deploy.pipeline import run_job

        job = asked_job(given, recipe, output, quiet=quiet)
        run_job(job, until)
        print_place(job.folder, quiet=quiet)

    return command


@app.command()
@takes(given=_SETTINGS.values())
def build(
    *,
    given: Values,
    recipe: opt.RecipeFile = None,
    output: opt.Output = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """The main job: score, prune, distill, export, build engines, measure, report."""
    from upvits.deploy.pipeline import require_target, run_job
    from upvits.deploy.report.views import terminal

    job = asked_job(given, recipe, output, quiet=quiet)
    report = run_job(job, "report")
    assert report is not None
    if json:
        print_json(report.model_dump_json(indent=2))
    else:
        console(quiet=quiet).print(terminal(report))
        print_place(job.folder, quiet=quiet)
    require_target(report)


@app.command()
@takes(given=_SETTINGS.values())
def plan(
    *,
    given: Values,
    recipe: opt.RecipeFile = None,
    output: opt.Output = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Print what would be cut; write nothing."""
    from upvits.deploy.cli.plan_view import plan_table
    from upvits.deploy.pipeline import preview
    from upvits.deploy.recipe.document import make_recipe

    made, timed = preview(make_recipe(recipe_values(given, recipe)), quiet=quiet)
    if json:
        print_json(dumps({"plan": loads(made.to_json()), "latency": timed and timed.model_dump(mode="json")}, indent=2))
    else:
        console().print(plan_table(made, timed))


_STAGES = {
    "score": ("score", "Run up to the importance of every unit."),
    "prune": ("prune", "Run up to the pruned network (before fine-tuning)."),
    "export": ("export", "Run up to the ONNX files, checked against PyTorch."),
    "quantize": ("precision", "Run up to the graphs of every precision, and what each costs."),
    "engine": ("engine", "Run up to the engines."),
}
for _name, (_until, _text) in _STAGES.items():
    app.command(_name, help=_text)(_stage_command(_until))
app.command()(distill)


@app.command()
@takes(given=_SETTINGS.values())
def recipe(
    *,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes.")] = False,
    given: Values,
    recipe: opt.RecipeFile = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Print every setting of a run, resolved, as TOML that --recipe takes; run nothing."""
    if schema:
        print_json(dumps(Recipe.model_json_schema(), indent=2))
        return
    from upvits.deploy.store.run_dir import recipe_toml

    resolved = asked_job(given, recipe, quiet=quiet).recipe
    if json:
        print_json(resolved.model_dump_json(indent=2))
    else:
        print_json(recipe_toml(resolved.model_dump()).rstrip("\n"))


@app.command()
@takes(given=_COMPARED)
def bench(
    *,
    models: Annotated[list[Path], typer.Argument(help="ONNX files, engine folders or runs, ours or not.")],
    batches: Annotated[str, typer.Option("--batches", "--batch", help="Batch sizes to time.")] = "1",
    seconds: Annotated[float, typer.Option(help="Seconds per batch size.")] = 5.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every CPU session.")] = None,
    input_shape: Annotated[
        list[str] | None, typer.Option(help="NAME=1x3x224x224, for axes that the file leaves open.")
    ] = None,
    given: Values,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the figures to this JSON file.", rich_help_panel=RUN),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compare the latency of any models in turns: the first is what the others are held against."""
    from upvits.deploy.measure.compare import compare
    from upvits.deploy.measure.compare_result import check_output, comparison_table
    from upvits.deploy.store.artifacts import atomic_write
    from upvits.deploy.store.disk import disk_errors

    if output is not None:
        check_output(output, models)
    chosen = {"streams": [1], **given.get("bench", {})}
    compared = compare(
        models,
        runtimes=given.get("engine", {}).get("runtime", "auto"),
        batches=whole_numbers(batches, "--batches", "Batch sizes to time."),
        seconds=seconds,
        threads=threads,
        input_shapes=dict(input_shape_of(text) for text in input_shape or ()),
        quiet=quiet,
        **chosen,
    )
    if output is not None:
        with disk_errors(output.parent, "bench"):
            atomic_write(output, compared.model_dump_json(indent=2).encode())
    if json:
        print_json(compared.model_dump_json(indent=2))
    else:
        console(quiet=quiet).print(comparison_table(compared))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.")],
    json: opt.Json = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write a comparison (HTML, JSON beside it).", rich_help_panel=RUN),
    ] = None,
    verbose: opt.Verbose = False,
) -> None:
    """Show the report of a run and write its pages again from report.json; or compare several runs."""
    from upvits.deploy.report.document import load_report
    from upvits.deploy.report.runs import compare_runs
    from upvits.deploy.report.views import save_report, terminal
    from upvits.deploy.report.views.runs import check_place, comparison_terminal, save_comparison
    from upvits.deploy.store.disk import disk_errors

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
            print_json(compared.model_dump_json(indent=2))
        else:
            console().print(comparison_terminal(compared))
        return
    document = load_report(runs[0])
    if json:
        print_json(document.model_dump_json(indent=2))
        return
    with disk_errors(runs[0], "report"):
        save_report(runs[0], document)
    console().print(terminal(document))


@app.command()
@takes(given=_SWEPT)
def sweep(
    *,
    ratios: Annotated[
        str | None,
        typer.Option(help="Shares of every dimension to remove, e.g. 0.3,0.5,0.7.", rich_help_panel=PLAN),
    ] = None,
    macs: Annotated[
        str | None, typer.Option(help="Shares of the MACs to keep, e.g. 0.65,0.5,0.35.", rich_help_panel=PLAN)
    ] = None,
    speedups: Annotated[
        str | None, typer.Option(help="Factors, e.g. 1.5x,2x,3x (planner latency).", rich_help_panel=PLAN)
    ] = None,
    latencies: Annotated[
        str | None, typer.Option(help="Per batch, e.g. 2ms,3ms (planner latency).", rich_help_panel=PLAN)
    ] = None,
    given: Values,
    recipe: opt.RecipeFile = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the runs. \\[default: runs/MODEL-sweep]", rich_help_panel=RUN),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Run the main job for several cuts and plot accuracy over latency."""
    from upvits.deploy.sweep import sweep as run_sweep
    from upvits.deploy.sweep import sweep_terminal

    cuts: list[dict[str, Any]] = [
        *({"ratio": number} for number in numbers(ratios, "--ratios")),
        *({"target_macs": number} for number in numbers(macs, "--macs")),
        *({"speedup": part} for part in split(speedups or "")),
        *({"target_latency": part} for part in split(latencies or "")),
    ]
    values = recipe_values(given, recipe)
    swept = run_sweep(values, cuts, output or Path("runs") / f"{values['model']}-sweep", quiet=quiet)
    if json:
        print_json(swept.model_dump_json(indent=2))
    else:
        console(quiet=quiet).print(sweep_terminal(swept))
    failed = [run.exit_code for run in swept.runs if run.exit_code]
    if failed:
        raise typer.Exit(failed[0])


@app.command()
def package(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. \\[default: RUN-package]", rich_help_panel=RUN),
    ] = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make a folder that runs without this tool: model, engines, examples, model card, Triton repository."""
    from upvits.deploy.handover.package import package as make

    print_place(make(run, output, quiet=quiet), quiet=quiet)


app.command()(inspect)
app.command()(predict)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of the name.")] = "",
    json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """List the timm models that can be pruned."""
    from upvits.deploy.cli.models_view import models_table
    from upvits.toolchain.networks.catalogue import architectures

    listed = list(architectures(pattern))
    if pattern and not listed:
        near = get_close_matches(pattern.lower(), [one.name for one in architectures()], n=5, cutoff=0.4)
        raise UserError(
            f"No architecture that can be pruned has {pattern!r} in its name.",
            fix=(f"Did you mean {', '.join(near)}? " if near else "") + "`upvits-deploy models` lists all of them.",
        )
    if json:
        print_json(dumps([asdict(architecture) for architecture in listed], indent=2))
    else:
        console().print(models_table(listed))


@app.command()
def doctor(json: opt.Json = False, verbose: opt.Verbose = False) -> None:
    """Say what is installed, what is missing for which feature, and how to get it."""
    from upvits.deploy.machine.doctor import doctor as examine
    from upvits.deploy.machine.doctor import render

    checks = examine()
    if json:
        print_json(dumps([asdict(check) for check in checks], indent=2))
    else:
        console().print(render(checks))


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"upvits-deploy {version('upvits-deploy')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    show_log()


def main() -> None:
    """Entry point: a command ends with its exit code and at most one message, not with a traceback."""
    leave_out_compiler()
    prepare_streams()
    sys.exit(exit_code_of_output(_run()))


def _run() -> int | str | None:
    def speak(error: Exception) -> int:
        return exit_code_of(error, options_of(app))

    try:
        alone = number_of_processes() == 1
    except UserError as error:
        return speak(error)
    if alone:
        return _run_command(app)
    return _run_command(lambda: lead(app, speak)) if is_first() else follow(speak)


def _run_command(command: Callable[[], object]) -> int | str | None:
    try:
        with _terminated_cleanly():
            require_working_folder()
            refuse_empty(sys.argv[1:])
            require_address_space()
            command()
    except SystemExit as error:
        if error.code == _INTERRUPTED:
            continues = sys.argv[1:2] and sys.argv[1] in {*_STAGES, "build", "sweep"}
            print("Interrupted. The same command continues." if continues else "Interrupted.", file=sys.stderr)
        return error.code
    except Exception as error:
        return exit_code_of(error, options_of(app))
    return 0


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the process as an exception, so that temporary folders are removed."""
    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main one
        yield
        return
    codes: dict[int, int] = {signal.SIGTERM: _TERMINATED, signal.SIGUSR1: StoppedError.exit_code}
    before = {number: signal.signal(number, lambda got, _: sys.exit(codes[got])) for number in codes}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
