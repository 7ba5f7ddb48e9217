"""`upvits-deploy detect`: detectors on the networks of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from upvits.deploy.cli import options as opt
from upvits.deploy.cli.console import console, print_json
from upvits.deploy.cli.settings import Values, settings_of, sides, takes
from upvits.deploy.recipe.detect import DetectRecipe, PruneRecipe, make_detect_recipe, make_prune_recipe
from upvits.deploy.recipe.setting import RUN

if TYPE_CHECKING:
    from upvits.deploy.store.artifacts import Artifact

_LOGGER = logging.getLogger(__name__)

app = typer.Typer(
    help="Object detection: train, judge, compare and export detectors on dense and pruned backbones.",
    no_args_is_help=True,
)

_SETTINGS = settings_of(DetectRecipe)
_TUNING = [_SETTINGS[name] for name in ("coco", "batch_size", "imitation", "workers", "cfg_options")]


def _run_command(engines: bool) -> Callable[..., None]:
    """A command that trains detectors on a run's networks, and with `engines` compares them; both take one schedule."""

    @takes(given=_SETTINGS.values())
    def command(
        *,
        run: Annotated[Path, typer.Option("--run", help="Run directory with a fine-tuned network.")],
        given: Values,
        json: opt.Json = False,
        quiet: opt.Quiet = False,
        verbose: opt.Verbose = False,
    ) -> None:
        _detect(run, given, engines=engines, json=json, quiet=quiet)

    return command


app.command(
    "train", help="Train detectors on the dense and the pruned network of a run, or continue; judge and export them."
)(_run_command(engines=False))
app.command(
    "compare",
    help="The same, then build engines of both, measure them in turns, and put all of it into the run's report.",
)(_run_command(engines=True))


@app.command()
@takes(cut=settings_of(PruneRecipe, within="cut.").values(), training=_TUNING)
def prune(
    *,
    detector: Annotated[Path, typer.Argument(help="Detector folder, e.g. RUN/7-detect/dense/detector.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")],
    cut: Values,
    epochs: Annotated[
        int | None, typer.Option(help="Of fine-tuning; 0 skips. \\[default: 3 on the demo, else 5]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate. \\[default: 0.3 of detect train's]")] = None,
    training: Values,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Prune a trained detector itself: backbone, and by ratio pyramid and head; then fine-tune it."""
    from upvits.deploy.detectors.prune import prune_detector

    schedule = {"epochs": epochs or None, "lr": lr, **training}
    stages = prune_detector(
        detector,
        make_prune_recipe(cut.get("cut", {})),
        make_detect_recipe({name: value for name, value in schedule.items() if value is not None}),
        output,
        fine_tune=epochs != 0,
        quiet=quiet,
    )
    names = {"0-dense": "dense", "2-prune": "pruned", "3-train": "fine-tuned"}
    _print_trained({names[stage]: made for stage, made in stages.items() if stage in names}, json=json, quiet=quiet)
    if not json:
        _print_text(console(quiet=quiet), f"Everything is in {output}")


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help="Run, detector folder, or exported ONNX file (decode).")],
    coco: Annotated[
        str | None, typer.Option(help="Folder in COCO's layout, or demo. \\[default: what it was trained on]")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="So many validation images. \\[default: all]")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for detections in COCO's result format.", rich_help_panel=RUN),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """AP of detectors on the validation images of a data set."""
    from upvits.deploy.detectors import evaluate as judging
    from upvits.deploy.detectors.tables import judged_table
    from upvits.deploy.recipe.detect_data import open_detection_data

    targets = judging.targets_of(target)
    data = open_detection_data(coco or judging.coco_of(target), quiet=quiet)
    if output is not None:
        judging.require_free(output, targets)
    judged = [judging.evaluate(path, data, images, quiet=quiet) for path in targets]
    if output is not None:
        judging.write(output, judged)
    _tell(data.notes)
    if json:
        print_json(dumps(judging.figures_of(judged), indent=2))
        return
    out = console(quiet=quiet)
    out.print(judged_table(judged))
    if output is not None:
        _print_text(out, f"Detections are in {output}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Detector folder, e.g. RUN/7-detect/pruned/detector.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    shape: Annotated[str, typer.Option(help="raw, decode or decode+nms.")] = "decode",
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH. \\[default: as trained]")] = None,
    uint8_input: Annotated[bool, typer.Option("--uint8-input", help="Take raw pixels.")] = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write a detector as ONNX: levels, decoded boxes, or boxes without overlaps."""
    from upvits.deploy.detectors.export import export_folder, parse_shape

    sizes = None if size is None else sides(size, "--size")
    export_folder(folder, output, parse_shape(shape), size=sizes, uint8_input=uint8_input)
    _print_text(console(), str(output))


def _detect(run: Path, given: Values, *, engines: bool, json: bool, quiet: bool) -> None:
    from upvits.deploy.detectors.runs import detect_in_run
    from upvits.deploy.detectors.tables import comparison_parts

    detectors, comparison = detect_in_run(run, make_detect_recipe(given), engines=engines, quiet=quiet)
    out = console(quiet=quiet)
    if comparison is None:
        _print_trained({str(name): artifact for name, artifact in detectors.items()}, json=json, quiet=quiet)
    else:
        _tell(comparison.notes)
        if json:
            print_json(comparison.model_dump_json(indent=2))
        else:
            out.print(comparison_parts(comparison))
    if json:
        return
    _print_text(out, f"Everything is in {run / '7-detect'}")
    if comparison is not None and not (run / "report.json").exists():
        _print_text(out, f"{run} has no report yet: `upvits-deploy build --recipe {run} --output {run}` writes it.")


def _print_trained(detectors: Mapping[str, Artifact], *, json: bool, quiet: bool) -> None:
    from upvits.deploy.detectors.accuracy import read_record
    from upvits.deploy.detectors.tables import trained_table

    if json:
        records = {name: read_record(artifact).model_dump(mode="json") for name, artifact in detectors.items()}
        print_json(dumps(records, indent=2))
    else:
        console(quiet=quiet).print(trained_table(detectors))


def _print_text(out: Console, text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        _LOGGER.warning("! %s", note)
