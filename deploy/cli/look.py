"""Commands that look at what there is: weights, and pictures through networks."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from upvits.calib_data.errors import UserError
from upvits.deploy.cli import options as opt
from upvits.deploy.cli.console import console, print_json
from upvits.deploy.recipe.setting import RUN


def inspect(
    weights: Annotated[str, typer.Argument(help="Checkpoint file, index of shards, or model folder.")],
    data: Annotated[
        str | None, typer.Option(help="Labelled images: accuracy in every plausible reading, e.g. imagefolder:DIR.")
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say what weights are, how they are read, and the command that prunes them; write nothing."""
    from upvits.deploy.inspection import inspect as inspected
    from upvits.deploy.inspection import inspection_terminal

    found = inspected(weights, data, quiet=quiet)
    if json:
        print_json(found.model_dump_json(indent=2))
        return
    out = console(quiet=quiet)
    out.print(inspection_terminal(found))
    if found.command:
        out.print(found.command, soft_wrap=True, highlight=False, markup=False)


def predict(
    source: Annotated[Path, typer.Argument(help="Run, package, model folder or ONNX file.")],
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    runtime: Annotated[
        str | None, typer.Option(help="Use the run's engines of this runtime. \\[default: the exported ONNX files]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Use the run's engines of this precision. \\[default: fp32]")
    ] = None,
    class_map: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line. \\[default: those of the network]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a page with the pictures (HTML).", rich_help_panel=RUN),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what the dense and the pruned network see in pictures: five classes each, and the time."""
    from upvits.deploy.predict.predictions import figures_of
    from upvits.deploy.predict.predictions import predict as predicted
    from upvits.deploy.predict.views import check_place, predictions_terminal, save_page
    from upvits.deploy.store.disk import disk_errors

    if output is not None:
        check_place(output)
    made = predicted(
        source,
        pictures,
        runtime=runtime,
        precision=precision,
        class_map=class_map,
        thumbnails=output is not None,
        quiet=quiet,
    )
    if output is not None:
        with disk_errors(output.parent, "predict"):
            save_page(output, made)
    if json:
        print_json(dumps(figures_of(made), indent=2))
    else:
        console(quiet=quiet).print(predictions_terminal(made))
        if output is not None:
            text = f"The page is {output}"
            console(quiet=quiet).print(text, soft_wrap=True, highlight=False, markup=False)
    if made.unread:
        raise typer.Exit(UserError.exit_code)
