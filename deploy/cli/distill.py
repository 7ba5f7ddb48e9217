"""`upvits-deploy distill`: the fine-tuning, or what it would take."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from typing import Annotated

import typer

from upvits.deploy.cli import options as opt
from upvits.deploy.cli.console import console, print_json, print_place
from upvits.deploy.cli.settings import Values, settings_of, takes
from upvits.deploy.cli.values import asked_job
from upvits.deploy.recipe.document import Recipe


@takes(given=settings_of(Recipe).values())
def distill(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the training takes here, from some steps; write nothing.")
    ] = False,
    given: Values,
    recipe: opt.RecipeFile = None,
    output: opt.Output = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Run up to the fine-tuned network."""
    from upvits.deploy.cli.dry_run_view import forecast_table
    from upvits.deploy.pipeline import run_job
    from upvits.deploy.stages.dry_run import dry_run as forecast_of

    job = asked_job(given, recipe, output, quiet=quiet)
    if not dry_run:
        run_job(job, "distill")
        print_place(job.folder, quiet=quiet)
        return
    found, whose = forecast_of(job)
    if json:
        print_json(dumps({**asdict(found), "measured_on": whose}, indent=2))
    else:
        console().print(forecast_table(job, found, whose))
