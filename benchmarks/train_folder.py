"""Train a timm model on labelled images from scratch, plainly: a checkpoint to try the main job on.

    python -m benchmarks.train_folder --model deit_tiny --data imagefolder:photos --size 112 --out deit_tiny.safetensors

The checkpoint is the moving average of the weights, next to it a log with the accuracy of every epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from upvits import toolchain
from upvits.calib_data import DataSource, batches, open_data
from upvits.calib_data.loading import TrainingBatches
from upvits.toolchain.training.evaluate import evaluate


def train(source: DataSource, model: nn.Module, options: argparse.Namespace) -> list[dict[str, float]]:
    """Cross-entropy with label smoothing, AdamW, cosine; returns the log. Writes the checkpoint after every epoch."""
    preprocess = toolchain.preprocess_of(model)
    training = TrainingBatches(source.train, preprocess, options.batch_size, workers=options.workers)
    steps = len(source.train) // options.batch_size
    optimizer = create_optimizer_v2(model, "adamw", lr=options.lr, weight_decay=0.05)
    schedule = CosineLRScheduler(
        optimizer, options.epochs * steps, lr_min=options.lr / 100, warmup_t=steps, warmup_lr_init=options.lr / 100,
        t_in_epochs=False,
    )  # fmt: skip
    average = ModelEmaV3(model, decay=0.999, use_warmup=True)
    log = []
    for epoch in range(options.epochs):
        started, losses = time.perf_counter(), []
        model.train()
        for step, (images, labels) in enumerate(track(training.epoch(epoch), f"epoch {epoch + 1}", total=steps)):
            schedule.step_update(epoch * steps + step)
            loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model, step=epoch * steps + step + 1)
            losses.append(loss.item())
        accuracy = evaluate(average.module, batches(source.val, preprocess, 64, workers=options.workers))
        line = {
            "epoch": epoch + 1,
            "loss": round(sum(losses) / len(losses), 4),
            "top1": round(accuracy.top1 or 0.0, 2),
            "seconds": round(time.perf_counter() - started, 1),
        }
        log.append(line)
        print(json.dumps(line), flush=True)
        save_file({name: tensor.contiguous() for name, tensor in average.module.state_dict().items()}, options.out)
        options.out.with_suffix(".jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return log


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny")
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    source = open_data(options.data)
    if source.class_names is None:
        parser.error("the images have no labels")
    model = toolchain.create_model(
        options.model, weights="random", num_classes=len(source.class_names), image_size=options.size
    )
    train(source, model, options)


if __name__ == "__main__":
    main()
