"""Figures with their uncertainty: intervals by hand, differences only where there are some, gates that know noise."""

import re

import numpy as np
import pytest

from tests.deploy.report.sample_report import sample_document
from upvits.deploy.measure.accuracy import Accuracy, accuracy
from upvits.deploy.measure.uncertainty import change_interval, share_interval
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import verdict
from upvits.deploy.report.views import html
from upvits.deploy.report.views.summary import shortcomings, tiles

Bounds = tuple[float, float]


def report_of(dense: float, pruned: float, **paired: int) -> Report:
    document = sample_document()
    document["dense"]["top1"], document["pruned"]["top1"] = dense, pruned
    return Report.model_validate({**document, "pruned": {**document["pruned"], "paired": paired}})


@pytest.mark.parametrize(
    ("share", "images", "low", "high"), [(50, 100, 40.38, 59.62), (100, 20, 83.89, 100), (0, 20, 0, 16.11)]
)
def test_the_interval_of_a_share_is_wilsons(share: float, images: int, low: float, high: float) -> None:
    assert share_interval(share, images) == pytest.approx((low, high), abs=0.01)


def test_the_interval_of_a_change_is_that_of_matched_pairs() -> None:
    # by hand: n = 102, change (20 - 5) / 102, differing (20 + 5 + 1) / 102
    change, differing = 15 / 102, 26 / 102
    spread = 1.96 * ((differing - change**2) / 102) ** 0.5
    assert change_interval(lost=5, won=20, images=100) == pytest.approx(
        (100 * (change - spread), 100 * (change + spread))
    )
    assert change_interval(lost=0, won=0, images=1000)[0] < 0 < change_interval(lost=0, won=0, images=1000)[1]


@pytest.mark.parametrize(
    ("images", "right", "lost", "won", "dense", "pruned", "change"),
    # counts of two real reports and one more; bounds by bisection of Wilson's inequality, and from four cells in exact
    # fractions
    [
        (1200, 1187, 6, 1, (98.155, 99.366), (97.641, 99.049), (-0.877, 0.045)),
        (341, 90, 4, 2, (21.996, 31.315), (21.450, 30.702), (-2.094, 0.927)),
        (341, 332, 12, 8, (95.061, 98.605), (93.588, 97.759), (-3.782, 1.449)),
    ],
)
def test_intervals_are_those_that_were_worked_out_by_another_way(
    images: int, right: int, lost: int, won: int, dense: Bounds, pruned: Bounds, change: Bounds
) -> None:
    assert share_interval(100 * right / images, images) == pytest.approx(dense, abs=0.002)
    assert share_interval(100 * (right - lost + won) / images, images) == pytest.approx(pruned, abs=0.002)
    assert change_interval(lost, won, images) == pytest.approx(change, abs=0.002)


def test_a_change_within_chance_is_no_gain() -> None:
    """1.17 points on 341 images, which has a standard error of about 1.3 points."""
    told = verdict(report_of(95.31, 96.48, images=341, lost=8, won=12, largest_class=40))
    assert "no certain change of top-1 (95.31 to 96.48 % on 341 images" in told
    assert "gained" not in told


def test_a_change_beyond_chance_is_spoken_of_with_its_range() -> None:
    told = verdict(report_of(98.0, 90.0, images=1000, lost=85, won=5, largest_class=100))
    low, high = change_interval(lost=85, won=5, images=1000)
    assert f"8.00 points of top-1 lost (98.00 to 90.00 % on 1,000 images, {low:+.2f} to {high:+.2f} points)" in told
    report = report_of(98.0, 90.0, images=1000, lost=85, won=5, largest_class=100)
    (tile,) = (tile for tile in tiles(report) if tile.name == "points of top-1")
    assert any("with 95 % certainty, 1,000 images" in detail for detail in tile.details)
    assert "95 % interval, 1,000 images" in re.sub("<[^>]*>", "", html(report))


@pytest.mark.parametrize(
    ("lost", "won", "said"), [(9, 4, "no certain change by int8"), (30, 5, "2.50 points lost by int8")]
)
def test_what_a_precision_costs_is_told_only_beyond_chance(lost: int, won: int, said: str) -> None:
    document = sample_document()
    (figures,) = (
        a for a in document["accuracy"] if (a["model"], a["runtime"], a["precision"]) == ("pruned", "openvino", "int8")
    )
    figures |= {"images": 1000, "lost": lost, "won": won, "drop": (lost - won) / 10}
    assert f"{said} on 1,000 images" in verdict(Report.model_validate(document))


def test_a_network_below_the_largest_class_is_warned_of_first() -> None:
    report = report_of(30.0, 31.0, images=100, lost=5, won=6, largest_class=40)
    assert "always naming the most frequent class would be right on 40.00 %" in shortcomings(report)[0]
    assert "most frequent" not in " ".join(
        shortcomings(report_of(60.0, 60.0, images=100, lost=0, won=0, largest_class=40))
    )


def test_graphs_on_fewer_images_than_pytorch_are_said_to_be() -> None:
    assert "1,200 of the 5,000 images" in html(report_of(98.0, 97.0, images=5000, lost=80, won=30, largest_class=500))


def logits(answers: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.eye(4, dtype=np.float32)[answers]


def test_one_image_of_a_small_set_does_not_start_a_search() -> None:
    labels = np.zeros(120, np.int64)
    right, one_wrong, five_wrong = ([0] * 120, [1] + [0] * 119, [1] * 5 + [0] * 115)
    one = accuracy(logits(right), logits(one_wrong), labels)
    assert one.drop == pytest.approx(100 / 120)
    assert one.drop_error == pytest.approx(100 * (1 / 120 * (1 - 1 / 120) / 120) ** 0.5)
    assert not one.loses_more_than(0.5)
    assert accuracy(logits(right), logits(five_wrong), labels).loses_more_than(0.5)


def test_gains_and_losses_are_counted_apart_and_without_labels_too() -> None:
    labels = np.array([0, 0, 0, 1])
    found = accuracy(logits([0, 0, 1, 1]), logits([1, 0, 0, 1]), labels)
    assert (found.lost, found.won, found.drop) == (1, 1, 0.0)
    unlabelled = accuracy(logits([0, 0, 1, 1]), logits([1, 0, 0, 1]), np.full(4, -1))
    assert (unlabelled.lost, unlabelled.won, unlabelled.drop) == (2, 0, 50.0)


def test_older_records_without_counts_are_judged_by_the_loss_alone() -> None:
    assert Accuracy(120, 90.0, 99.0, 0.83, 40.0).loses_more_than(0.5)
