"""Batches: the transforms of timm, and an order that depends on seed and epoch alone."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from upvits.calib_data import DataSource, Images, Preprocess, batches, open_data, proxy_images
from upvits.calib_data.demo import demo_images

PREPROCESS = Preprocess((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")


@pytest.fixture(scope="module")
def images() -> Images:
    return demo_images("train", 40)


def all_of(loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(loader)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_evaluation_batches_are_the_pictures_in_order(images: Images) -> None:
    parts = list(batches(images, PREPROCESS, 16))
    assert [tuple(x.shape) for x, _ in parts] == [(16, 3, 64, 64), (16, 3, 64, 64), (8, 3, 64, 64)]
    x, y = all_of(parts)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert y.tolist() == list(images.labels)
    pixels = torch.frombuffer(bytearray(images[21][0].tobytes()), dtype=torch.uint8).reshape(64, 64, 3)
    torch.testing.assert_close(x[21], pixels.permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_evaluation_transform_is_timms(crop_mode: str) -> None:
    image = Image.effect_noise((90, 50), 60).convert("RGB")
    preprocess = Preprocess((3, 32, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.8, crop_mode)
    expected = create_transform(
        (3, 32, 48),
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        crop_pct=0.8,
        crop_mode=crop_mode,
    )(image)
    assert tuple(expected.shape) == (3, 32, 48)
    torch.testing.assert_close(preprocess.eval_transform()(image), expected, rtol=0, atol=0)


# torch warns where there are more workers than cores: that is about speed, and this about results.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_training_batches_depend_on_seed_and_epoch_alone(images: Images) -> None:
    def run(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return all_of(batches(images, PREPROCESS, 8, train=True, **options))

    x, y = run(seed=1, epoch=2)
    torch.manual_seed(99)
    random.seed(99)
    for options in ({}, {"workers": 2}):
        again_x, again_y = run(seed=1, epoch=2, **options)
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)
    for other in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 1}, {"seed": 2, "epoch": 2}):
        assert not torch.equal(x, run(**other)[0])
    assert Counter(y.tolist()) == Counter(images.labels)
    assert y.tolist() != list(images.labels)


def test_training_changes_each_picture_in_each_epoch() -> None:
    same = Images([0, 1, 2, 3], lambda index: demo_images("train", 12)[4][0])
    x, _ = all_of(batches(same, PREPROCESS, 4, train=True))
    assert len({picture.numpy().tobytes() for picture in x}) == 4


def test_loading_leaves_the_global_generators_alone(images: Images) -> None:
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1).item()
    random.seed(5)
    torch.manual_seed(5)
    list(batches(images, PREPROCESS, 8, train=True))
    list(batches(images, PREPROCESS, 8))
    assert (random.random(), torch.rand(1).item()) == expected


def test_incomplete_training_batches_are_dropped_unless_alone(images: Images) -> None:
    assert [len(y) for _, y in batches(images, PREPROCESS, 16, train=True)] == [16, 16]
    assert [len(y) for _, y in batches(images, PREPROCESS, 64, train=True)] == [40]


def test_proxy_is_balanced_random_and_from_the_training_pictures() -> None:
    labels = [0] * 30 + [1] * 5 + [2] * 30
    train = Images(labels, lambda index: Image.new("RGB", (64, 64), (index, labels[index], 0)))
    source = DataSource("x", ("a", "b", "c"), train, Images([], train._read), "digest")

    def chosen(count: int, seed: int) -> list[tuple[int, int]]:
        pixels = ((proxy_images(source, PREPROCESS, count, seed).read()[:, :, 0, 0] + 1) * 127.5).round().int()
        return [(int(index), int(label)) for index, label, _ in pixels]

    picked = chosen(13, seed=0)
    assert sorted(Counter(label for _, label in picked).values()) == [4, 4, 5]
    assert len({index for index, _ in picked}) == 13
    assert picked == chosen(13, seed=0)
    assert picked != chosen(13, seed=1)
    assert picked[:6] == chosen(6, seed=0)
    assert Counter(label for _, label in chosen(25, seed=0)) == {0: 10, 1: 5, 2: 10}
    assert len(chosen(1000, seed=0)) == 65


def test_proxy_of_unlabelled_pictures() -> None:
    train = Images([-1] * 20, lambda index: Image.new("RGB", (64, 64), (index * 10, 0, 0)))
    source = DataSource("x", None, train, train, "digest")
    proxy = proxy_images(source, PREPROCESS, 8, seed=3).read()
    assert len({float(picture[0, 0, 0]) for picture in proxy}) == 8


def test_proxy_of_the_demo_set() -> None:
    proxy = proxy_images(open_data("demo"), PREPROCESS, 24, seed=0).read()
    assert tuple(proxy.shape) == (24, 3, 64, 64)
    assert proxy.min() >= -1
    assert proxy.max() <= 1
