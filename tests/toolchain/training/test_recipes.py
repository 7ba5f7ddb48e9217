"""What recipes of training switch on: accumulation, layer decay, augmentation, precision, compilation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.toolchain.training.tiny_training import preprocess, source, tiny_vit, train
from upvits.calib_data.demo import demo_images
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import Augmentation, Preprocess, TrainingBatches
from upvits.toolchain.training.preparation import autocast_type, prepare
from upvits.toolchain.training.settings import DistillSettings
from upvits.toolchain.training.teacher import Teacher

STILL = DistillSettings(epochs=1, batch_size=32, lr=8e-3, warmup_epochs=0, drop_path=None, cutmix=0, ema_decay=0)
PICTURES = Preprocess((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
STRONG = Augmentation(min_crop=0.2, auto_augment="rand-m9-mstd0.5-inc1", views=2)


def weights_of(settings: DistillSettings, folder: Path | None = None) -> torch.Tensor:
    model = train(folder, settings, source(64), plain=True).model
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = weights_of(STILL), weights_of(replace(STILL, accumulation=4))
    assert not torch.equal(whole, parts)  # sums of another order
    torch.testing.assert_close(whole, parts, rtol=0, atol=5e-3)
    assert (whole - parts).abs().mean() < 1e-5


def test_rates_fall_from_layer_to_layer() -> None:
    settings = replace(STILL, layer_decay=0.5, weight_decay=0.1)
    run = prepare(
        tiny_vit(1), Teacher(tiny_vit(0), preprocess()), source(), preprocess(), settings, torch.device("cpu")
    )
    names = {parameter: name for name, parameter in run.state.learner.named_parameters()}
    scale = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in run.state.optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(scale) == set(names.values())
    assert scale["model.head.weight"] == (1.0, 0.1)
    depth = sum(name.endswith("attn.qkv.weight") for name in scale)
    last, first = (scale[f"model.blocks.{index}.attn.qkv.weight"][0] for index in (depth - 1, 0))
    assert first == pytest.approx(last * 0.5 ** (depth - 1))
    assert scale["model.patch_embed.proj.weight"][0] < first
    assert scale["model.pos_embed"][1] == scale["model.head.bias"][1] == 0


def test_a_moving_average_of_zero_is_none() -> None:
    run = train(None, STILL, source(64), plain=True)
    with_average = train(None, replace(STILL, ema_decay=0.99), source(64), plain=True)
    assert run.history[0].loss == with_average.history[0].loss
    assert any(
        not torch.equal(one, other)
        for one, other in zip(run.model.parameters(), with_average.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "3a", "augmix-m5-w4-d2", "original-mstd0.5"])
def test_strong_changes_depend_on_the_seed_alone(policy: str) -> None:
    augmentation = Augmentation(min_crop=0.2, auto_augment=policy, color_jitter=0.3 if policy == "3a" else 0.0, views=2)
    images = demo_images("train", 24)

    def run(share: tuple[int, int] = (0, 1), skip: int = 0, seed: int = 5) -> list[torch.Tensor]:
        training = TrainingBatches(images, PICTURES, 8, augmentation=augmentation, seed=seed, share=share)
        return [pictures for pictures, _ in training.epoch(1, skip)]

    whole = run()
    halves = [run((rank, 2)) for rank in range(2)]
    assert all(torch.equal(step, torch.cat(parts)) for step, *parts in zip(whole, *halves, strict=True))
    assert torch.equal(run(skip=2)[0], whole[2])
    assert not torch.equal(run(seed=6)[0], whole[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_strong_changes_do_not_depend_on_the_number_of_workers() -> None:
    images = demo_images("train", 16)
    runs = [
        torch.cat([x for x, _ in TrainingBatches(images, PICTURES, 8, augmentation=STRONG, workers=n).epoch(0)])
        for n in (0, 2)
    ]
    assert torch.equal(*runs)


def test_repeated_augmentation_shows_fewer_images_more_often() -> None:
    images = demo_images("train", 24)
    training = TrainingBatches(images, PICTURES, 8, augmentation=replace(STRONG, auto_augment="none", views=3))
    pictures = torch.cat([x for x, _ in training.epoch(0)])
    assert len(pictures) == 24
    assert len({picture.numpy().tobytes() for picture in pictures}) == 24
    labels = Counter(label for _, some in training.epoch(0) for label in some.tolist())
    assert all(count % 3 == 0 for count in labels.values())


def test_erased_boxes_are_noise_in_a_share_of_the_images() -> None:
    settings = replace(STILL, random_erasing=1.0)
    run = prepare(
        tiny_vit(1), Teacher(tiny_vit(0), preprocess()), source(), preprocess(), settings, torch.device("cpu")
    )
    images = torch.full((8, 3, 16, 16), 7.0)
    erased = run.erasing(images.clone())
    assert all((picture != 7).any() and (picture == 7).any() for picture in erased)
    none = prepare(tiny_vit(1), Teacher(tiny_vit(0), preprocess()), source(), preprocess(), STILL, torch.device("cpu"))
    assert torch.equal(none.erasing(images.clone()), images)


@pytest.mark.parametrize(
    "change", [{"optimizer": "lamb"}, {"optimizer": "sgd"}, {"channels_last": True}, {"amp": "bf16"}, {"mixup": 0.8}]
)
def test_every_switch_trains(change: dict[str, object]) -> None:
    result = train(None, replace(STILL, **change), source(64), plain=True)  # type: ignore[arg-type]
    assert math.isfinite(result.history[-1].loss)


def test_killed_inside_an_epoch_of_the_strongest_recipe_sees_what_was_left(tmp_path: Path) -> None:
    strong = replace(
        STILL, epochs=2, accumulation=2, mixup=0.8, cutmix=1.0, label_smoothing=0.1, random_erasing=0.25,
        repeated_augmentation=2, auto_augment="rand-m5-inc1", layer_decay=0.8, clip_grad=1.0, checkpoint_minutes=0.0,
        ema_decay=0.9,
    )  # fmt: skip
    data = source(96)
    whole = weights_after(None, strong, data)

    def stop(reads: int) -> None:
        if reads == 64 + 96 + 40:  # validation images are read too
            raise KeyboardInterrupt

    data.train.on_read = stop  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        weights_after(tmp_path, strong, data)
    data.train.on_read = lambda _: None  # type: ignore[attr-defined]
    assert torch.equal(weights_after(tmp_path, strong, data), whole)


def weights_after(folder: Path | None, settings: DistillSettings, data: object) -> torch.Tensor:
    model = train(folder, settings, data).model  # type: ignore[arg-type]
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_compiled_training_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without code that is generated, which takes minutes of a C++ compiler."""
    plain = weights_of(STILL)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.testing.assert_close(plain, weights_of(replace(STILL, compile=True)), rtol=0, atol=5e-3)


def test_a_compiler_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"torch\.compile does not work here") as caught:
        weights_of(replace(STILL, compile=True))
    assert "No working C++ compiler" in caught.value.why
    assert "compile = false" in caught.value.fix


def test_fp16_on_a_processor_is_refused() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        autocast_type(torch.device("cpu"), "fp16")
    assert autocast_type(torch.device("cpu"), "bf16") == torch.bfloat16
    assert autocast_type(torch.device("cpu"), "auto") is None
