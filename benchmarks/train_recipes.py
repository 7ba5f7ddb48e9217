"""What each recipe of training makes of one and the same cut, at equal epochs.

    python -m benchmarks.train_recipes                                            # the demo model, three seeds
    python -m benchmarks.train_recipes --model vit_s14 runs/vit_s14 imagefolder:photos --epochs 4 --images 2000

`--model NAME FOLDER DATA` may be repeated; `benchmarks/checkpoints.py` makes such folders. The network is cut once for
each seed, compensated as `build` does it, and then trained by every recipe from there. `labels alone` is `short`
without a teacher. Every row is saved as soon as it is measured; the same command goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import record
from upvits import toolchain
from upvits.calib_data import DataSource, open_data
from upvits.calib_data.loading import proxy_set
from upvits.deploy.recipe.train_recipe import train_values
from upvits.toolchain import DistillSettings
from upvits.toolchain.training.settings import settings_for

RESULT = record.RESULTS / "train_recipes.json"
RECIPES = ("no training", "labels alone", "short", "up", "modern")


def settings_of(recipe: str, model: nn.Module, source: DataSource, epochs: int | None, seed: int) -> DistillSettings:
    """As the command line resolves them, with the same epochs for all."""
    suited = settings_for(model, source)
    if recipe == "labels alone":
        values: dict[str, Any] = {"label_weight": 1.0, "logit_weight": 0.0, "feature_weight": 0.0}
    else:
        values = train_values(recipe, len(source.train))
    values = asdict(suited) | values
    values["warmup_epochs"] = min(values["warmup_epochs"], (epochs or suited.epochs) / 5)
    return DistillSettings(**values | {"epochs": epochs or suited.epochs, "seed": seed, "eval_every": 1_000})


def rows_of(
    name: str, model: nn.Module, source: DataSource, asked: argparse.Namespace, done: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """Top-1 by recipe and seed; the dense network's beside it."""
    dense = toolchain.accuracy(model, source)
    for seed in range(asked.seeds):
        wanted = [recipe for recipe in RECIPES if (name, asked.ratio, seed, recipe) not in done]
        if not wanted:
            continue
        images = toolchain.calibration_images(model, source, asked.calib_images, seed=seed)
        scores = toolchain.score(model, images, seed=seed)
        small = toolchain.prune(model, toolchain.plan(model, scores, ratio=asked.ratio), images, seed=seed)
        for recipe in wanted:
            started = time.process_time()
            trained, settings = small, None
            if recipe != "no training":
                settings = settings_of(recipe, model, source, asked.epochs, seed)
                trained = toolchain.distill(small, model, source, settings=settings, device="cpu").model
            found = toolchain.accuracy(trained, source, reference=dense.predictions)
            yield {
                "network": name, "ratio": asked.ratio, "seed": seed, "recipe": recipe, "top1": found.top1,
                "agreement": found.agreement, "dense": dense.top1, "images": len(source.val),
                "cpu_seconds": round(time.process_time() - started, 1),
                "settings": None if settings is None else settings.decisive,
            }  # fmt: skip


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Mean and deviation over seeds."""
    table = Table("network", "ratio", "dense", *RECIPES)
    for network, ratio in dict.fromkeys((row["network"], row["ratio"]) for row in rows):
        of_network = [row for row in rows if (row["network"], row["ratio"]) == (network, ratio)]
        by_recipe = ([row["top1"] for row in of_network if row["recipe"] == recipe] for recipe in RECIPES)
        dense = record.spread([of_network[0]["dense"]])
        table.add_row(network, f"{ratio:g}", dense, *(record.spread(values) for values in by_recipe))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs=3, action="append", metavar=("NAME", "FOLDER", "DATA"))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, help="of every recipe; default: those of short")
    parser.add_argument("--images", type=int, help="training images at most")
    parser.add_argument("--calib-images", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    for name, folder, data in asked.model or [("demo PVTv2-B0", "", "demo")]:
        model = toolchain.load(Path(folder)) if folder else toolchain.create_model("pvtv2_b0", weights="demo")
        source = open_data(data)
        if asked.images is not None:
            source = replace(source, train=proxy_set(source, asked.images, seed=0))
        done = {(row["network"], row["ratio"], row["seed"], row["recipe"]) for row in rows}
        for row in rows_of(name, model, source, asked, done):
            rows.append(row)
            record.write(asked.out, record.document({"calib_images": asked.calib_images}, rows))
    Console().print(table_of(rows))


if __name__ == "__main__":
    main()
