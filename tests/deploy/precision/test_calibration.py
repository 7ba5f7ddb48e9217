"""Ranges of activations from images."""

import hashlib
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from tests.deploy.precision.graphs import Array, graph_of
from upvits.calib_data.errors import GateError, UserError
from upvits.deploy.precision import calibrate

node = onnx.helper.make_node


def conv_and_product() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights: dict[str, Array] = {
        "kernel": random.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "shape": np.array([0, 4, -1], np.int64),
        "w": random.normal(size=(9, 5)).astype(np.float32),
    }
    nodes = [
        node("Conv", ["x", "kernel"], ["c"], "conv", strides=[2, 2]),
        node("Reshape", ["c", "shape"], ["r"], "flat"),
        node("MatMul", ["r", "w"], ["y"], "product"),
    ]
    return graph_of(nodes, weights, ["batch", 3, 6, 6])


def images_of(*sizes: int) -> list[Array]:
    random = np.random.default_rng(1)
    return [random.normal(size=(size, 3, 6, 6)).astype(np.float32) for size in sizes]


def test_the_largest_of_each_channel_over_all_batches() -> None:
    batches = images_of(4, 4, 1)
    ranges = calibrate(conv_and_product(), iter(batches), quiet=True)
    every = np.concatenate(batches)
    assert set(ranges.amax) == {"x", "r", "c"}  # and what the convolution makes
    assert ranges.amax["c"].shape == (4,)
    np.testing.assert_array_equal(ranges.amax["x"], np.abs(every).max(axis=(0, 2, 3)))
    assert ranges.amax["r"].shape == (9,)  # channels are what the product sums over
    assert (ranges.images, ranges.method) == (9, "max")
    assert ranges.digest == hashlib.sha256(every.tobytes()).hexdigest()
    assert calibrate(conv_and_product(), [every], quiet=True).digest == ranges.digest


def test_one_batch_at_a_time() -> None:
    taken = []

    def lazily() -> Iterator[Array]:
        for index, batch in enumerate(images_of(2, 2, 2)):
            taken.append(index)
            yield batch
            assert taken == list(range(index + 1))  # nothing was asked for ahead

    assert calibrate(conv_and_product(), lazily(), quiet=True).images == 6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stop_it(value: float) -> None:
    (images,) = images_of(3)
    images[1, 0, 0, 0] = value
    with pytest.raises(GateError, match="NaN or infinity"):
        calibrate(conv_and_product(), [images], quiet=True)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 3, 8, 8), np.float32), np.zeros((2, 3, 6), np.float32), np.zeros((2, 3, 6, 6), np.uint8)],
    ids=["size", "rank", "type"],
)
def test_images_that_do_not_fit_are_refused_before_they_run(images: Array) -> None:
    with pytest.raises(UserError, match=r"do not fit the model\n.*\[batch, 3, 6, 6\]"):
        calibrate(conv_and_product(), [images], quiet=True)


def test_no_images() -> None:
    with pytest.raises(UserError, match="no calibration images"):
        calibrate(conv_and_product(), [], quiet=True)
