"""The drawn pictures: the same everywhere, balanced, and not to be had with a linear classifier."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.train_demo import linear_baseline
from upvits.calib_data import drawing, open_data
from upvits.calib_data.drawing import CLASS_NAMES, SHAPES, TEXTURES, draw_labelled, draw_scene

FROZEN_CELLS = np.array(
    [
        [57.7, 60.3, 63.5, 69.4],
        [60.8, 161.7, 153.1, 59.2],
        [82.6, 156.6, 96.0, 62.4],
        [64.5, 62.1, 61.6, 62.3],
    ]
)


def test_a_picture_depends_on_nothing_but_its_arguments() -> None:
    program = (
        "import hashlib; from drawing import draw_labelled; "
        "print(hashlib.sha256(draw_labelled(3, 'val', 77, 64)[0].tobytes()).hexdigest())"
    )
    folder = Path(drawing.__file__).parent  # imported alone: the package would bring torch along
    other = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    draw_labelled(3, "val", 12, 64)  # drawing another one first changes nothing
    pixels, label = draw_labelled(3, "val", 77, 64)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == other.stdout.strip()
    assert label == 77 % 12


def test_the_picture_is_the_one_that_the_demo_model_was_trained_on() -> None:
    """Frozen means of 8x8 cells, to one grey level: sine and hypot may differ in the last bit between machines."""
    pixels, _ = draw_labelled(0, "train", 5, 64)
    cells = pixels.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3, 4))
    assert np.abs(cells[::2, ::2] - FROZEN_CELLS).max() < 1.0


def test_seed_split_and_index_each_change_the_picture() -> None:
    first = draw_labelled(0, "train", 0, 64)[0]
    for other in [(1, "train", 0), (0, "val", 0), (0, "train", 12)]:
        assert not np.array_equal(first, draw_labelled(*other, 64)[0])


def test_size_changes_the_resolution_and_not_the_picture() -> None:
    small, large = (draw_labelled(0, "train", 10, size)[0].astype(float) for size in (64, 128))
    shrunk = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - shrunk).mean() < 6  # pixel noise differs, and edges by a fraction of a pixel
    other = draw_labelled(0, "train", 22, 64)[0].astype(float)
    assert np.abs(small - other).mean() > 20


def test_classes_are_all_pairs_and_balanced() -> None:
    assert len(CLASS_NAMES) == len(SHAPES) * len(TEXTURES) == 12
    assert set(CLASS_NAMES) == {f"{texture}_{shape}" for shape in SHAPES for texture in TEXTURES}
    source = open_data("demo")
    assert set(Counter(source.train.labels).values()) == {500}
    assert set(Counter(source.val.labels).values()) == {100}


def test_pixels_do_not_give_the_class_to_a_linear_classifier() -> None:
    train, val = (
        (
            torch.stack([torch.from_numpy(draw_labelled(0, split, i, 64)[0]).permute(2, 0, 1) for i in range(count)]),
            torch.arange(count) % 12,
        )
        for split, count in (("train", 1800), ("val", 480))
    )
    assert linear_baseline(train, val, seed=0) < 50
    assert linear_baseline(train, train, seed=0) > 25  # it does learn what it is shown


def test_scenes_have_one_to_four_objects_inside_the_picture() -> None:
    counts: Counter[int] = Counter()
    for index in range(40):
        scene = draw_scene(0, "train", index, 128)
        counts[len(scene.objects)] += 1
        for item in scene.objects:
            x, y, width, height = item.box
            assert 0 <= x < x + width <= 128
            assert 0 <= y < y + height <= 128
            # Every shape fills between a fifth (thin cross, leaning) and all of its box.
            assert 0.2 < item.area / (width * height) <= 1
            assert min(width, height) >= 0.5 * max(width, height)
    assert set(counts) == {1, 2, 3, 4}


def test_a_box_touches_the_object_on_all_four_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    draw_object = drawing._draw_object

    def record(*arguments: Any) -> Any:
        masks.append(draw_object(*arguments))
        return masks[-1]

    monkeypatch.setattr(drawing, "_draw_object", record)
    scene = draw_scene(0, "val", 4, 160)
    assert len(masks) == len(scene.objects)
    for mask, item in zip(masks, scene.objects, strict=True):
        x, y, width, height = item.box
        inside = mask[y : y + height, x : x + width]
        assert inside.sum() == mask.sum() == item.area
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
