"""Accuracy of sessions: one pass for all, whole batches for engines, figures that follow from the outputs."""

from types import TracebackType

import numpy as np
import pytest

from upvits.calib_data.errors import GateError
from upvits.deploy.measure.accuracy import accuracy, outputs_of, sqnr_db
from upvits.deploy.runtimes.interface import Arrays, CallTimes, LayerTime


class Doubling:
    """Gives twice its input, and remembers the batches that it got."""

    input_names = ("images",)
    output_names = ("logits",)
    on_gpu = False
    settings: dict[str, str | int | bool] = {}  # noqa: RUF012 - a stand-in

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        self.batches.append(len(feeds["images"]))
        return {"logits": 2 * feeds["images"]}

    def time(self, feeds: Arrays, calls: int) -> CallTimes:
        raise NotImplementedError

    def layer_times(self, feeds: Arrays, calls: int) -> tuple[LayerTime, ...]:
        return ()

    def close(self) -> None: ...

    def __enter__(self) -> "Doubling":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def test_every_session_gets_whole_batches_and_what_fills_them_is_left_out() -> None:
    images = np.arange(14, dtype=np.float32).reshape(7, 2)
    fed = [(images[:4], np.array([0, 1, 0, 1])), (images[4:], np.array([1, 1, -1]))]
    one, two = Doubling(), Doubling()
    outputs, labels = outputs_of({"one": one, "two": two}, fed, 4)
    assert one.batches == two.batches == [4, 4]
    assert np.array_equal(outputs["one"], 2 * images)
    assert labels.tolist() == [0, 1, 0, 1, 1, 1, -1]


def test_figures_follow_from_the_outputs() -> None:
    reference = np.array([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    candidate = reference.copy()
    candidate[3] = [2.0, 1.0]
    found = accuracy(reference, candidate, np.array([0, 1, 0, 1]))
    assert (found.images, found.top1, found.agreement, found.drop) == (4, 75.0, 75.0, 25.0)
    assert found.sqnr_db == pytest.approx(10 * np.log10(20 / 2))
    unlabelled = accuracy(reference, candidate, np.full(4, -1))
    assert (unlabelled.top1, unlabelled.agreement, unlabelled.drop) == (None, 75.0, 25.0)


def test_a_gain_is_a_negative_drop() -> None:
    reference, candidate = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert accuracy(reference, candidate, np.array([1])).drop == -100.0


def test_unlabelled_images_do_not_count_for_top1() -> None:
    reference = np.eye(3)
    found = accuracy(reference, np.roll(reference, 1, axis=1), np.array([0, -1, -1]))
    assert (found.top1, found.agreement) == (0.0, 0.0)


def test_what_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(GateError, match="fp16 gives NaN") as refusal:
        accuracy(np.ones((2, 2)), np.array([[1.0, np.inf], [0.0, 1.0]]), np.array([0, 1]), "fp16")
    assert refusal.value.exit_code == 4


def test_equal_outputs_have_a_ratio_with_an_end() -> None:
    assert sqnr_db(np.ones((1, 2)), np.ones((1, 2))) == 200.0
