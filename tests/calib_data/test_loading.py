"""Batches: the transforms of timm, and an order that depends on seed and epoch alone."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from upvits.calib_data import DataSource, Images, Preprocess, batches, open_data, proxy_images
from upvits.calib_data.demo import demo_images
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import Augmentation, TrainingBatches

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
    def run(epoch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return all_of(TrainingBatches(images, PREPROCESS, 8, seed=seed).epoch(epoch))

    x, y = run(2, seed=1)
    torch.manual_seed(99)
    random.seed(99)
    with_workers = TrainingBatches(images, PREPROCESS, 8, seed=1, workers=2)
    next(with_workers.epoch(1))  # given up in its middle
    for again_x, again_y in (run(2, seed=1), *(all_of(with_workers.epoch(2)) for _ in range(2))):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)
    halves = [list(TrainingBatches(images, PREPROCESS, 8, seed=1, share=(rank, 2)).epoch(2)) for rank in range(2)]
    assert torch.equal(x, torch.cat([part[0] for step in zip(*halves, strict=True) for part in step]))
    assert torch.equal(x[16:], all_of(with_workers.epoch(2, skip=2))[0])
    for seed, epoch in ((1, 3), (2, 1), (2, 2)):
        assert not torch.equal(x, run(epoch, seed=seed)[0])
    assert Counter(y.tolist()) == Counter(images.labels)
    assert y.tolist() != list(images.labels)


def test_training_changes_each_picture_in_each_epoch() -> None:
    same = Images([0, 1, 2, 3], lambda index: demo_images("train", 12)[4][0])
    training = TrainingBatches(same, PREPROCESS, 4)
    x = torch.cat([all_of(training.epoch(number))[0] for number in range(2)])
    assert len({picture.numpy().tobytes() for picture in x}) == 8


def test_all_generators_are_seeded_for_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's augmentations draw from all three."""

    def drawn(image: Image.Image) -> torch.Tensor:
        return torch.tensor([random.random(), float(np.random.random()), torch.rand(1).item()])

    monkeypatch.setattr(Preprocess, "train_transform", lambda *_: drawn)
    images = Images([0] * 12, lambda index: Image.new("RGB", (8, 8)))
    runs = [all_of(TrainingBatches(images, PREPROCESS, size).epoch(4))[0] for size in (4, 6)]
    assert torch.equal(*runs)
    assert all(len(set(column.tolist())) == 12 for column in runs[0].T)


@pytest.mark.parametrize("policy", ["rand-m10-n6-inc1", "rand-m1-n6-inc0", "augmix-m10", "original", "v0"])
def test_the_strongest_and_the_weakest_policies_work_on_every_picture(policy: str) -> None:
    """timm's posterizing asks Pillow for no bits at all at some strengths."""
    transform = PREPROCESS.train_transform(Augmentation(auto_augment=policy))
    picture = demo_images("train", 12)[4][0]
    for seed in range(60):
        random.seed(seed)
        np.random.seed(seed)
        transform(picture)


def test_loading_leaves_the_global_generators_alone(images: Images) -> None:
    def seeded() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), torch.rand(1).item()

    seeded()
    expected = drawn()
    seeded()
    list(TrainingBatches(images, PREPROCESS, 8).epoch(0))
    list(batches(images, PREPROCESS, 8))
    assert drawn() == expected


def test_incomplete_training_batches_are_dropped(images: Images) -> None:
    assert [len(y) for _, y in TrainingBatches(images, PREPROCESS, 16).epoch(0)] == [16, 16]


def test_batch_that_is_larger_than_the_data_is_refused(images: Images) -> None:
    with pytest.raises(UserError, match="A batch of 41 is larger than the data, which have 40") as caught:
        TrainingBatches(images, PREPROCESS, 41)
    assert "`batch_size=40` or less" in caught.value.fix
    assert len(list(TrainingBatches(images, PREPROCESS, 40).epoch(0))) == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("workers", [0, 2])
def test_file_that_vanishes_while_training_is_named_without_a_traceback(tmp_path: Path, workers: int) -> None:
    for number in range(12):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.effect_noise((20, 20), 60).save(folder / f"{number}.png")
    source = open_data(f"imagefolder:{tmp_path}")
    training = TrainingBatches(source.train, PREPROCESS, 4, workers=workers)
    list(training.epoch(0))
    for file in tmp_path.glob("*/*.png"):
        file.unlink()
    for loader in (training.epoch(1), batches(source.val, PREPROCESS, 2, workers=workers)):
        with pytest.raises(UserError, match=r"^The image .*\.png is gone\.\n") as caught:
            list(loader)
        assert "same command" in caught.value.fix
        assert "Traceback" not in str(caught.value)


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
