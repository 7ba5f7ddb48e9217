"""`upvits-deploy detect`: detectors on the networks of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy import options as opt

app = typer.Typer(
    help="Object detection: train, judge and export detectors on dense and pruned backbones.", no_args_is_help=True
)

Run = Annotated[Path, typer.Option("--run", help="Run directory with a fine-tuned network.")]
Coco = Annotated[str, typer.Option("--coco", help="Folder in COCO's layout, or demo. \\[default: demo]")]


@app.command()
def train(
    run: Run,
    coco: Coco = "demo",
    detector: Annotated[str | None, typer.Option(help="retinanet or mask-rcnn. \\[default: retinanet]")] = None,
    backbones: Annotated[str | None, typer.Option(help="both, dense or pruned. \\[default: both]")] = None,
    epochs: Annotated[int | None, typer.Option(help="\\[default: 8 on the demo, else 12]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Per process. \\[default: 8 on the demo, else 2]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate for 16 images a step. \\[default: 1e-4]")] = None,
    imitation: Annotated[float | None, typer.Option(help="Weight of the dense detector's features.")] = None,
    amp: Annotated[bool | None, typer.Option("--amp", help="Mixed precision.")] = None,
    workers: Annotated[int | None, typer.Option(help="Reading processes.")] = None,
    cfg_options: Annotated[list[str] | None, typer.Option(help="key=value of mmdet's configuration.")] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Train detectors on the dense and the pruned backbone of a run, or continue, and compare them."""
    from deploy.detectors.recipe import DetectRecipe
    from deploy.detectors.runs import detect_in_run, detection_table
    from detection.openmm import parse_option

    given = {
        "coco": coco, "detector": detector, "backbones": backbones, "epochs": epochs, "batch_size": batch_size,
        "lr": lr, "imitation": imitation, "amp": amp, "workers": workers,
        "cfg_options": dict(parse_option(text) for text in cfg_options or ()),
    }  # fmt: skip
    wanted = DetectRecipe.model_validate({name: value for name, value in given.items() if value is not None})
    found = detect_in_run(run, wanted, quiet=quiet)
    console = Console(quiet=quiet)
    for note in found.notes:
        console.print(f"! {note}", style="yellow", highlight=False, markup=False)
    console.print(detection_table(found))
    console.print(f"Everything is in {found.run / '7-detect'}", soft_wrap=True, highlight=False, markup=False)
