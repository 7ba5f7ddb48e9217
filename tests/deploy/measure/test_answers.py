"""Which images are worth showing, and what is counted by class."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from upvits.deploy.measure.answers import ClassCounts, best_classes, counts_by_class, thumbnail, worth_showing


def test_kinds_of_differences_take_turns_and_agreement_comes_last() -> None:
    #                lost lost lost  won  both wrong, then three that agree
    labels = np.array([0, 0, 0, 1, 2, 0, 1, 2])
    dense = np.array([0, 0, 0, 0, 0, 0, 1, 0])
    pruned = np.array([1, 2, 1, 1, 1, 0, 1, 0])
    assert worth_showing(dense, pruned, labels, 6) == [0, 3, 4, 1, 5, 6]
    assert worth_showing(dense, pruned, labels, 12) == [0, 3, 4, 1, 2, 5, 6, 7]
    assert worth_showing(dense, dense, labels, 4) == [0, 2, 4, 6]


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 2, st.integers(-1, 2)), min_size=1, max_size=60), st.integers(1, 20))
def test_shown_images_are_few_different_and_differing_ones_first(images: list[tuple[int, int, int]], most: int) -> None:
    dense, pruned, labels = (np.array(column) for column in zip(*images, strict=True))
    chosen = worth_showing(dense, pruned, labels, most)
    assert len(chosen) == len(set(chosen)) == min(most, len(images))
    agree = [bool(dense[place] == pruned[place]) for place in chosen]
    assert agree == sorted(agree)


def test_classes_are_counted_by_label_and_unlabelled_images_not_at_all() -> None:
    labels = np.array([0, 0, 0, 2, 2, -1])
    dense, pruned = np.array([0, 0, 1, 2, 0, 0]), np.array([0, 1, 0, 2, 2, 1])
    assert counts_by_class(dense, pruned, labels) == {0: ClassCounts(3, 2, 1, 1), 2: ClassCounts(2, 1, 0, 1)}
    assert counts_by_class(dense, pruned, np.full(6, -1)) == {}


def test_probabilities_are_those_of_a_softmax() -> None:
    first, second = best_classes(np.array([0.0, np.log(3.0), -np.inf]), 2)
    assert (first[0], second[0]) == (1, 0)
    assert first[1] == pytest.approx(75)
    assert second[1] == pytest.approx(25)


def test_a_thumbnail_is_small_and_says_nothing_but_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    picture.info["comment"] = b"taken at home"
    text = thumbnail(picture, 192)
    assert len(text) <= 48 << 10
    data = base64.b64decode(text)
    with Image.open(io.BytesIO(data)) as small:
        assert (small.format, small.size) == ("JPEG", (192, 144))
    assert b"home" not in data
