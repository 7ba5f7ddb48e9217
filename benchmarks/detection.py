"""Two ways to a small detector: prune the backbone first, or prune the detector that was trained.

    python -m benchmarks.detection                 # drawn scenes, 3 seeds of the cut; an hour on two cores
    python -m benchmarks.detection --quick --json  # one seed, fewer epochs
    python -m benchmarks.detection --run RUN --coco DIR

Backbone first: a classifier is pruned and fine-tuned, then a detector is trained on it. Detector first: the detector on
the dense backbone is scored by its own class maps and boxes (`--task detection`), cut at the same ratio, refitted and
fine-tuned for a part of the schedule; random scores stand beside it. AP is PyTorch's on all validation images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from upvits.deploy.detectors.accuracy import read_record
from upvits.deploy.detectors.prune import prune_detector
from upvits.deploy.detectors.runs import detect_in_run
from upvits.deploy.pipeline import build
from upvits.deploy.recipe.detect import DetectRecipe, PruneRecipe
from upvits.deploy.store.artifacts import Artifact

RATIO = 0.5


def row(way: str, artifact: Artifact, epochs: int, seed: int | None = None) -> dict[str, Any]:
    """What one detector came to."""
    figures = read_record(artifact)
    return {
        "way": way,
        "seed": seed,
        "epochs": epochs,
        "ap": 100 * figures.pytorch.ap,
        "ap50": 100 * figures.pytorch.ap50,
        "ap75": 100 * figures.pytorch.ap75,
        "params": figures.params,
        "macs": figures.macs,
        "seconds": artifact.manifest.seconds,
    }


def measure(run: Path, coco: str, seeds: int, epochs: int | None, tune: int, out: Path) -> list[dict[str, Any]]:
    """Rows of all ways; trainings that are whole are taken as they are."""
    wanted = DetectRecipe(coco=coco, epochs=epochs)
    trained, _ = detect_in_run(run, wanted, engines=False, quiet=not sys.stderr.isatty())
    full = int(str(trained["dense"].manifest.settings["epochs"]))
    rows = [row("dense", trained["dense"], full), row("backbone first", trained["pruned"], full)]
    tuning = DetectRecipe(coco=coco, epochs=tune)
    ways = {
        "detector first": {"task": "detection"},
        "detector first, cut only": {"task": "detection", "compensate": False},
        "random units, cut only": {"task": "random", "compensate": False},
        "detector first, half of pyramid and head too": {"task": "detection", "head_ratio": 0.5},
    }
    for seed in range(seeds):
        for name, values in ways.items():
            recipe = PruneRecipe(ratio=RATIO, seed=seed, **values)  # type: ignore[arg-type]
            place = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            found = prune_detector(trained["dense"].folder / "detector", recipe, tuning, place)
            rows.append(row(f"{name}, before fine-tuning", found["2-prune"], 0, seed))
            rows.append(row(name, found["3-train"], tune, seed))
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as people read them."""
    shown = Table("way", "seed", "epochs", "AP", "AP50", "AP75", "params, M", "GMACs")
    for one in rows:
        shown.add_row(
            one["way"],
            "" if one["seed"] is None else str(one["seed"]),
            str(one["epochs"]),
            *(f"{one[key]:.1f}" for key in ("ap", "ap50", "ap75")),
            f"{one['params'] / 1e6:.2f}",
            f"{one['macs'] / 1e9:.3f}",
        )
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="with a fine-tuned network; default: the demo at half its widths")
    parser.add_argument("--coco", default="demo")
    parser.add_argument("--work", type=Path, default=Path("runs/detection-benchmark"))
    parser.add_argument("--seeds", type=int, help="of the cut and its fine-tuning; default 3, with --quick 1")
    parser.add_argument("--epochs", type=int, help="of the trainings from scratch; default: the schedule's")
    parser.add_argument("--tune", type=int, help="epochs of fine-tuning; default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "detection.json")
    asked = parser.parse_args()
    run = asked.run or asked.work / "run"
    if asked.run is None:
        build({"model": "pvtv2_b0", "plan": {"ratio": RATIO}}, run, until="distill")
    seeds, tune = asked.seeds or (1 if asked.quick else 3), asked.tune or (1 if asked.quick else 3)
    epochs = asked.epochs or (2 if asked.quick else None)
    rows = measure(run, asked.coco, seeds, epochs, tune, asked.work)
    document = record.document({"ratio": RATIO, "coco": asked.coco, "tune": tune}, rows)
    record.write(asked.out, document)
    Console().print(table(rows))
    if asked.json:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
