"""A training of seconds: four colours, a tiny ViT as teacher, the same one with damaged weights as student.

`run` is what tests start in processes of their own, to kill them or to have several of them.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from upvits.calib_data import DataSource, Images, Preprocess
from upvits.toolchain.training.distillation import DistillResult, distill
from upvits.toolchain.training.settings import DistillSettings

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (150, 150, 30))


class Plain(Preprocess):
    """Trains on the images as they are."""

    def train_transform(self, _: object) -> Callable[[Image.Image], torch.Tensor]:
        return self.eval_transform()


class Colours(Images):
    """Noisy images of one colour each; calls `on_read` with the number of images read so far."""

    def __init__(self, images: int, seed: int, labelled: bool = True) -> None:
        classes = np.arange(images) % 4
        spread = np.random.default_rng(seed).integers(-60, 61, (images, 16, 16, 3))
        self.pixels = (np.array(COLOURS)[classes][:, None, None, :] + spread).clip(0, 255).astype(np.uint8)
        self.reads = 0
        self.on_read: Callable[[int], None] = lambda _reads: None
        super().__init__(classes.tolist() if labelled else [-1] * images, self.draw)

    def draw(self, index: int) -> Image.Image:
        self.reads += 1
        self.on_read(self.reads)
        return Image.fromarray(self.pixels[index])


def preprocess(plain: bool = False, size: int = 16) -> Preprocess:
    half = (0.5, 0.5, 0.5)
    kind = Plain if plain else Preprocess
    return kind((3, size, size), mean=half, std=half, interpolation="bilinear", crop_pct=1.0, crop_mode="center")


def source(images: int = 96, labelled: bool = True) -> DataSource:
    names = ("red", "green", "blue", "olive") if labelled else None
    train, val = Colours(images, 0, labelled), Colours(64, 1, labelled)
    return DataSource("colours", names, train, val, f"colours-{images}-{labelled}")


def tiny_vit(seed: int = 0, embed_dim: int = 32, num_classes: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=embed_dim, depth=2, num_heads=2, num_classes=num_classes, **options
    )
    return model


def damaged(model: nn.Module, noise: float) -> nn.Module:
    """A copy with noise on every weight, in proportion to its tensor's spread."""
    copy = tiny_vit()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std(unbiased=False) * noise)
    return copy


def train(folder: Path | None, settings: DistillSettings, data: DataSource, plain: bool = False) -> DistillResult:
    return distill(tiny_vit(1), tiny_vit(0), data, preprocess(plain), settings, folder, device="cpu")


def run(options: dict[str, Any]) -> None:
    """One process of a training. Options: `settings`, `source` and `folder`; `out`, a folder for the final weights
    and losses; `environment`; `kill_at_image`: dies when it reads its nth training image; `kill_in_save`: dies
    before its nth checkpoint is put in place."""
    os.environ.update(options.get("environment", {}))
    torch.set_num_threads(1)
    data = source(**options.get("source", {}))

    def die(now: bool) -> None:
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    data.train.on_read = lambda reads: die(reads == options.get("kill_at_image"))  # type: ignore[attr-defined]
    replace, saves = Path.replace, iter(range(1, 1000))

    def replace_or_die(draft: Path, target: Path) -> Path:
        die(target.name == "checkpoint.safetensors" and next(saves) == options.get("kill_in_save"))
        return replace(draft, target)

    Path.replace = replace_or_die  # type: ignore[method-assign,assignment]
    result = train(Path(options["folder"]), DistillSettings(**options["settings"]), data, options.get("plain", False))
    rank = os.environ.get("RANK", "0")
    out = Path(options["out"])
    save_file(result.model.state_dict(), out / f"{rank}.safetensors")
    figures = [[entry.loss, entry.top1] for entry in result.history]
    (out / f"{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
