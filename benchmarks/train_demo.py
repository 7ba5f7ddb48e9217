"""Trains the demo model that ships in `calib_data/demo_weights`: timm's PVTv2-B0 on the drawn pictures.

    torchrun --nproc-per-node 2 -m benchmarks.train_demo --out runs/demo-training

Plain `python -m` works too; two processes of one thread each are about twice as fast as one process of two threads.
The same command continues a killed run after its last whole epoch. About half an hour on two busy CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from rich.progress import track
from safetensors.torch import save_file
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from upvits.calib_data.drawing import CLASS_NAMES, DRAWING_VERSION, draw_labelled

MODEL_NAME = "pvt_v2_b0"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the result.

    `lr` is the peak, `epochs` the length of its cosine. Training ends early, after the first epoch in which the
    averaged weights reach `stop_at_top1` percent: a demo needs a good model, and something left to lose.
    """

    seed: int = 0
    size: int = 64
    train_images: int = 12_000
    val_images: int = 1_200
    epochs: int = 14
    warmup_steps: int = 150
    batch_size: int = 48
    lr: float = 5e-4
    weight_decay: float = 0.02
    clip_grad: float = 1.0
    ema_decay: float = 0.998
    stop_at_top1: float = 98.5


def draw(split: str, count: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """`count` pictures [N, 3, H, W] uint8 and their labels [N]."""
    drawn = [
        draw_labelled(settings.seed, split, index, settings.size)
        for index in track(range(count), description=f"drawing {split}")
    ]
    images = torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in drawn])


def normalise(images: Tensor) -> Tensor:
    """uint8 to about [-1, 1]: mean and standard deviation 0.5, as the shipped config says."""
    return images.float() / 127.5 - 1.0


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, another order of the colour channels and a small shift: none of them changes the class."""

    def dice(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    size = images.shape[-1]
    padded = nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    result = []
    for image in padded:
        top, left = dice(9), dice(9)
        image = image[torch.randperm(3, generator=generator), top : top + size, left : left + size]
        result.append(image.flip(-1) if dice(2) else image)
    return torch.stack(result)


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in percent."""
    model.eval()
    predicted = torch.cat([model(normalise(images[at : at + 100])).argmax(1) for at in range(0, len(images), 100)])
    return 100.0 * float((predicted == labels).float().mean())


def linear_baseline(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], seed: int) -> float:
    """Top-1 in percent of softmax regression on the pixels: how far colours and places alone get."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(train[0][0].numel(), len(CLASS_NAMES)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        order = torch.randperm(len(train[0]), generator=generator)
        for at in range(0, len(order), 128):
            chosen = order[at : at + 128]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(normalise(train[0][chosen])), train[1][chosen])
            torch.autograd.backward(loss)
            optimizer.step()
    return top1(model, *val)


def initialise(model: nn.Module) -> None:
    """Linear layers at unit gain. timm's 0.02 suits long schedules; at these widths it starts far too quietly."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "head":
            nn.init.xavier_uniform_(layer.weight)


class Training:
    """Model, average and optimiser of one run, with a checkpoint after each epoch."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.folder = settings, folder
        self.steps = settings.train_images // settings.batch_size
        self.model = timm.create_model(MODEL_NAME, num_classes=len(CLASS_NAMES))
        initialise(self.model)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.parallel = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.average = ModelEmaV3(self.model, decay=settings.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=settings.epochs * self.steps,
            lr_min=1e-6,
            warmup_t=settings.warmup_steps,
            warmup_lr_init=1e-6,
            t_in_epochs=False,
        )
        self.epoch = 0

    def run_epoch(self, images: Tensor, labels: Tensor) -> float:
        """One pass over the pictures, in an order and with changes fixed by (seed, epoch). Returns the mean loss."""
        order = torch.randperm(len(images), generator=self.generator(0))
        generator = self.generator(1 + self.rank)
        self.model.train()
        losses = []
        for step in range(self.steps):
            chosen = order[step * self.settings.batch_size : (step + 1) * self.settings.batch_size]
            chosen = chosen[self.rank :: self.world]
            done = self.epoch * self.steps + step
            self.scheduler.step_update(done)
            logits = self.parallel(normalise(augment(images[chosen], generator)))
            loss = nn.functional.cross_entropy(logits, labels[chosen])
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
            self.optimizer.step()
            self.average.update(self.model, step=done)
            losses.append(loss.item())
            if step % 25 == 24 and self.rank == 0:
                recent = sum(losses[-25:]) / 25
                print(f"  epoch {self.epoch} step {step + 1}/{self.steps} loss {recent:.4f}", flush=True)
        self.epoch += 1
        return sum(losses) / self.steps

    def wait(self) -> None:
        """Until all processes are here, so that they read the same log."""
        if self.world > 1:
            dist.barrier()

    def generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.settings.seed * 1000 + self.epoch) * 100 + stream)

    def save(self) -> None:
        state = {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.epoch = state["epoch"]
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])


def train(settings: Settings, folder: Path) -> None:
    """Trains to the end, or continues; writes `train.jsonl` line by line and `train.json` at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(settings, folder)
    training.resume()
    train_set, val_set = draw("train", settings.train_images, settings), draw("val", settings.val_images, settings)
    while training.epoch < settings.epochs and last_top1(folder) < settings.stop_at_top1:
        start = time.perf_counter()
        loss = training.run_epoch(*train_set)
        if training.rank:
            training.wait()
            continue
        line = {
            "epoch": training.epoch,
            "lr": training.optimizer.param_groups[0]["lr"],
            "loss": round(loss, 5),
            "top1": round(top1(training.model, *val_set), 3),
            "top1_average": round(top1(training.average.module, *val_set), 3),
            "seconds": round(time.perf_counter() - start, 1),
        }
        training.save()
        with (folder / "train.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)
        training.wait()
    if training.rank:
        return
    save_model(training, folder / "model.safetensors")
    report = {
        "model": MODEL_NAME,
        "settings": asdict(settings),
        "drawing_version": DRAWING_VERSION,
        "processes": training.world,
        "epochs": training.epoch,
        "samples_seen": training.steps * settings.batch_size * training.epoch,
        "top1": round(top1(halved(training.average.module), *val_set), 3),
        "top1_of": settings.val_images,
        "linear_baseline_top1": round(linear_baseline(train_set, val_set, settings.seed), 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    write_json(folder / "config.json", model_config(training.model, settings))
    write_json(folder / "train.json", report)
    print(report)


def last_top1(folder: Path) -> float:
    """Top-1 in percent of the averaged weights after the last whole epoch; 0 before the first."""
    log = folder / "train.jsonl"
    return float(json.loads(log.read_text().splitlines()[-1])["top1_average"]) if log.exists() else 0.0


def halved(model: nn.Module) -> nn.Module:
    """The same model with its weights rounded to fp16, as they ship."""
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    return model


def save_model(training: Training, path: Path) -> None:
    weights = {name: tensor.half().contiguous() for name, tensor in training.average.module.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def model_config(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """What timm's `local-dir:` source wants to know."""
    return {
        "architecture": MODEL_NAME,
        "num_classes": len(CLASS_NAMES),
        "num_features": model.num_features,
        "model_args": {},
        "pretrained_cfg": {
            "num_classes": len(CLASS_NAMES),
            "input_size": [3, settings.size, settings.size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "label_names": list(CLASS_NAMES),
        },
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and result")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    train(Settings(**{name: options[name] for name in asdict(Settings())}), options["out"])


if __name__ == "__main__":
    main()
