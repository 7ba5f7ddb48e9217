"""How fast training images come, beside timm's own loader: the same folder, transforms and workers, in turns.

python -m benchmarks.loading imagefolder:DIR      # JSON into --out

Both loaders keep their workers from epoch to epoch; the first epoch of each is not counted. timm's loader is measured
as its training script uses it by default (`prefetcher`: pixels as integers, normalised beside the model) and with the
whole transform in the workers (`plain`). Ratios are those of epochs next to each other, and their median: by images
per second of wall time, and per second of processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import timm
import torch
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader

from benchmarks.record import RESULTS, document, write
from upvits.calib_data import Preprocess, open_data
from upvits.calib_data.loading import Augmentation, TrainingBatches

Epoch = Callable[[int], Iterable[Any]]


def ours(spec: str, preprocess: Preprocess, batch_size: int, workers: int) -> Epoch:
    """Our batches of an epoch by its number."""
    return TrainingBatches(open_data(spec).train, preprocess, batch_size, workers=workers).epoch


def of_timm(folder: Path, preprocess: Preprocess, batch_size: int, workers: int, *, prefetcher: bool) -> Epoch:
    """timm's, of the same files and with the same transforms."""
    loader = create_loader(
        ImageDataset(str(folder)),
        preprocess.input_size,
        batch_size,
        is_training=True,
        no_aug=False,
        scale=(Augmentation().min_crop, 1.0),
        color_jitter=0.0,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=False,
        use_prefetcher=prefetcher,
        device=torch.device("cpu"),
    )
    return lambda number: loader


def processor_s() -> float:
    """Seconds of processor time that this process and its workers have taken so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children()))


def images_per_s(epoch: Iterable[Any]) -> tuple[float, float]:
    """Of one epoch, from its first batch to its last: by wall time, by processor time."""
    started, used, images = time.perf_counter(), processor_s(), 0
    for batch, _ in epoch:
        images += len(batch)
    return images / (time.perf_counter() - started), images / (processor_s() - used)


def in_turns(loaders: dict[str, Epoch], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Images per second of every loader in every round, after an epoch that is not counted."""
    for epoch in loaders.values():
        images_per_s(epoch(0))
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for number in range(1, rounds + 1):
        for name, epoch in loaders.items():
            speeds[name].append(images_per_s(epoch(number)))
    return speeds


def compared(mine: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians and ratios, by wall time and by processor time."""
    row: dict[str, Any] = {}
    for kind, name in enumerate(("wall", "processor")):
        own, other = ([speed[kind] for speed in speeds] for speeds in (mine, theirs))
        ratios = [one / two for one, two in zip(own, other, strict=True)]
        row[name] = {
            "ours_images_per_s": round(median(own), 1),
            "timm_images_per_s": round(median(other), 1),
            "ratio": round(median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="imagefolder:DIR with DIR/train/CLASS/*.jpg")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "loading.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(asked.data.partition(":")[2]) / "train"
    preprocess = Preprocess(
        (3, asked.size, asked.size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, "center"
    )
    rows = []
    for workers in asked.workers:
        settings = (preprocess, asked.batch_size, workers)
        speeds = in_turns(
            {
                "ours": ours(asked.data, *settings),
                "plain": of_timm(folder, *settings, prefetcher=False),
                "prefetcher": of_timm(folder, *settings, prefetcher=True),
            },
            asked.rounds,
        )
        for name in ("plain", "prefetcher"):
            row = {"workers": workers, "timm": name, **compared(speeds["ours"], speeds[name])}
            rows.append(row)
            print(row, flush=True)
    kept = {name: value for name, value in vars(asked).items() if name not in ("out", "data")}
    write(asked.out, document(kept, rows, timm=timm.__version__, images=len(open_data(asked.data).train)))


if __name__ == "__main__":
    main()
