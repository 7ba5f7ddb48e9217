"""`upvits-deploy detect`: detectors on the networks of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from upvits.calib_data.errors import UserError
from upvits.deploy.cli import options as opt

app = typer.Typer(
    help="Object detection: train, judge, compare and export detectors on dense and pruned backbones.",
    no_args_is_help=True,
)

Run = Annotated[Path, typer.Option("--run", help="Run directory with a fine-tuned network.")]
Coco = Annotated[str | None, typer.Option("--coco", help="Folder in COCO's layout, or demo. \\[default: demo]")]
Detector = Annotated[str | None, typer.Option(help="retinanet or mask-rcnn. \\[default: retinanet]")]
Backbones = Annotated[str | None, typer.Option(help="both, dense or pruned. \\[default: both]")]
Epochs = Annotated[int | None, typer.Option(help="\\[default: 8 on the demo, else 12]")]
BatchSize = Annotated[int | None, typer.Option(help="Per process. \\[default: 8 on the demo, else 2]")]
Lr = Annotated[
    float | None, typer.Option(help="Peak rate for 16 images a step. \\[default: 2e-3 on the demo, else 1e-4]")
]
Scale = Annotated[
    str | None, typer.Option(help="Largest sides in pixels, e.g. 1333x800. \\[default: 128x128 on the demo]")
]
Imitation = Annotated[float | None, typer.Option(help="Weight of the dense detector's features.")]
Amp = Annotated[bool | None, typer.Option("--amp", help="Mixed precision.")]
FpnChannels = Annotated[
    int | None, typer.Option(help="Width of pyramid and head. \\[default: 96 on the demo, else 256]")
]
StackedConvs = Annotated[
    int | None, typer.Option(help="Convolutions of each branch of the head. \\[default: 2 on the demo, else 4]")
]
Tensorboard = Annotated[bool | None, typer.Option("--tensorboard", help="Write curves for it.")]
Workers = Annotated[int | None, typer.Option(help="Reading processes.")]
CfgOptions = Annotated[list[str] | None, typer.Option(help="key=value of mmdet's configuration; may be repeated.")]
ApImages = Annotated[int | None, typer.Option(help="Validation images that engines are judged on. \\[default: 500]")]
Batches = Annotated[str | None, typer.Option("--bench-batches", help="Batch sizes to time. \\[default: 1]")]


def _run_command(engines: bool) -> Callable[..., None]:
    """A command that trains detectors on a run's networks, and with `engines` compares them; both take one schedule."""

    def command(
        run: Run,
        coco: Coco = None,
        detector: Detector = None,
        backbones: Backbones = None,
        epochs: Epochs = None,
        batch_size: BatchSize = None,
        lr: Lr = None,
        scale: Scale = None,
        imitation: Imitation = None,
        fpn_channels: FpnChannels = None,
        stacked_convs: StackedConvs = None,
        amp: Amp = None,
        tensorboard: Tensorboard = None,
        workers: Workers = None,
        cfg_options: CfgOptions = None,
        ap_images: ApImages = None,
        bench_batches: Batches = None,
        quiet: opt.Quiet = False,
    ) -> None:
        from upvits.deploy.cli.values import whole_numbers

        wanted = {
            "coco": coco, "detector": detector, "backbones": backbones, "epochs": epochs, "batch_size": batch_size,
            "lr": lr, "scale": _scale(scale), "imitation": imitation, "amp": amp, "workers": workers,
            "fpn_channels": fpn_channels, "stacked_convs": stacked_convs, "tensorboard": tensorboard,
            "cfg_options": _options(cfg_options), "ap_images": ap_images,
            "batches": whole_numbers(bench_batches, "Batch sizes", "--bench-batches"),
        }  # fmt: skip
        _detect(run, wanted, engines=engines, quiet=quiet)

    return command


app.command(
    "train", help="Train detectors on the dense and the pruned network of a run, or continue; judge and export them."
)(_run_command(engines=False))
app.command(
    "compare",
    help="The same, then build engines of both, measure them in turns, and put all of it into the run's report.",
)(_run_command(engines=True))


@app.command()
def prune(
    detector: Annotated[Path, typer.Argument(help="Detector folder, e.g. RUN/7-detect/dense/detector.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")],
    coco: Coco = None,
    ratio: opt.Ratio = None,
    target_macs: opt.TargetMacs = None,
    head_ratio: Annotated[
        float | None, typer.Option(help="Share of the channels of pyramid and head to remove. \\[default: 0]")
    ] = None,
    planner: Annotated[str | None, typer.Option(help="uniform or global. \\[default: uniform]")] = None,
    task: Annotated[
        str | None, typer.Option(help="Scores: detection (class maps and boxes) or random. \\[default: detection]")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Unlabelled images to score and refit on. \\[default: 128]")
    ] = None,
    compensate: opt.Compensate = None,
    epochs: Annotated[
        int | None, typer.Option(help="Of fine-tuning; 0 skips. \\[default: 3 on the demo, else 5]")
    ] = None,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate. \\[default: 0.3 of detect train's]")] = None,
    imitation: Imitation = None,
    workers: Workers = None,
    cfg_options: CfgOptions = None,
    quiet: opt.Quiet = False,
) -> None:
    """Prune a trained detector itself: backbone, and by ratio pyramid and head; then fine-tune it."""
    from upvits.deploy.detectors.prune import prune_detector
    from upvits.deploy.detectors.tables import trained_table
    from upvits.deploy.recipe.detect import make_detect_recipe, make_prune_recipe

    cut = {
        "ratio": ratio, "target_macs": target_macs, "head_ratio": head_ratio, "planner": planner, "task": task,
        "images": images, "compensate": compensate,
    }  # fmt: skip
    training = {
        "coco": coco, "epochs": epochs or None, "batch_size": batch_size, "lr": lr, "imitation": imitation,
        "workers": workers, "cfg_options": _options(cfg_options),
    }  # fmt: skip
    wanted = make_prune_recipe({name: value for name, value in cut.items() if value is not None})
    schedule = make_detect_recipe({name: value for name, value in training.items() if value is not None})
    found = prune_detector(detector, wanted, schedule, output, fine_tune=epochs != 0, quiet=quiet)
    if not found:
        return
    console = Console(quiet=quiet)
    names = {"0-dense": "dense", "2-prune": "pruned", "3-train": "fine-tuned"}
    console.print(trained_table({names[stage]: own for stage, own in found.items() if stage in names}))
    console.print(f"Everything is in {output}", soft_wrap=True, highlight=False, markup=False)


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help="Run, detector folder, or exported ONNX file (decode).")],
    coco: Coco = None,
    images: Annotated[int | None, typer.Option(min=1, help="So many validation images. \\[default: all]")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for detections in COCO's result format.")
    ] = None,
    quiet: opt.Quiet = False,
) -> None:
    """AP of detectors on the validation images of a data set."""
    from upvits.deploy.detectors import evaluate as judging
    from upvits.deploy.detectors.flow import open_data
    from upvits.deploy.detectors.tables import judged_table

    targets = judging.targets_of(target)
    data = open_data(coco or judging.coco_of(target), quiet=quiet)
    if output is not None:
        judging.require_free(output, targets)
    found = [judging.evaluate(path, data, images, quiet=quiet) for path in targets]
    if output is not None:
        judging.write(output, found)
    console = Console(quiet=quiet)
    _print_notes(console, data.notes)
    console.print(judged_table(found))
    if output is not None:
        console.print(f"Detections are in {output}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Detector folder, e.g. RUN/7-detect/pruned/detector.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    shape: Annotated[str, typer.Option(help="raw, decode or decode+nms.")] = "decode",
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH. \\[default: as trained]")] = None,
    uint8_input: Annotated[bool, typer.Option("--uint8-input", help="Take raw pixels.")] = False,
) -> None:
    """Write a detector as ONNX: levels, decoded boxes, or boxes without overlaps."""
    from upvits.deploy.detectors.evaluate import export as write

    write(folder, output, shape, size=_scale(size, "--size"), uint8=uint8_input)
    print(output)


def _detect(run: Path, given: dict[str, Any], *, engines: bool, quiet: bool) -> None:
    from upvits.deploy.detectors.runs import detect_in_run
    from upvits.deploy.detectors.tables import comparison_parts, trained_table
    from upvits.deploy.recipe.detect import make_detect_recipe

    wanted = make_detect_recipe({name: value for name, value in given.items() if value is not None})
    detectors, comparison = detect_in_run(run, wanted, engines=engines, quiet=quiet)
    if not detectors:  # one of the processes that only train
        return
    console = Console(quiet=quiet)
    if comparison is None:
        console.print(trained_table(detectors))
    else:
        _print_notes(console, comparison.notes)
        console.print(comparison_parts(comparison))
    console.print(f"Everything is in {run / '7-detect'}", soft_wrap=True, highlight=False, markup=False)
    if comparison is not None and not (run / "report.json").exists():
        console.print(f"{run} has no report yet: `upvits-deploy build --recipe {run} --output {run}` writes it.",
                      soft_wrap=True, highlight=False, markup=False)  # fmt: skip


def _print_notes(console: Console, notes: Any) -> None:
    for note in notes:
        console.print(f"! {note}", style="yellow", highlight=False, markup=False)


def _scale(text: str | None, option: str = "--scale") -> tuple[int, int] | None:
    """Two sides in pixels."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text!r} is not valid.", fix=f"Give two sides in pixels, like {option} 1333x800.")
    return int(parts[0]), int(parts[1])


def _options(texts: list[str] | None) -> dict[str, Any] | None:
    if not texts:
        return None
    from upvits.detection.openmm import parse_option

    return dict(parse_option(text) for text in texts)
