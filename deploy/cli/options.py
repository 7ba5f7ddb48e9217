"""Options that are no settings of a recipe: where results go, and what is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from upvits.deploy.cli.log import be_quiet, be_verbose
from upvits.deploy.recipe.setting import RUN

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run directory. \\[default: runs/MODEL-CUT]", rich_help_panel=RUN)
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Values from this TOML file.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.", rich_help_panel=RUN)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no report.", rich_help_panel=RUN, callback=be_quiet),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="More notes, and where an error arose.", rich_help_panel=RUN, callback=be_verbose
    ),
]
