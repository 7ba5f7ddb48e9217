"""The sections on single images and classes, and on the fine-tune."""

from __future__ import annotations

from collections.abc import Sequence

from upvits.deploy.measure.uncertainty import change_interval
from upvits.deploy.report.answers import Answer, Answers
from upvits.deploy.report.document import Report
from upvits.deploy.report.views.section import Bar, Cell, Section, count, percent, points, seconds, signed, words

CLASSES_SHOWN, _FOLDED_FROM = 8, 12


def pictures(report: Report) -> Section:
    """Sample images with the answers of both networks; the page shows them as pictures."""
    answers = report.answers
    if answers is None or not answers.samples:
        return Section("pictures", "What the networks answer")
    return Section(
        "pictures",
        "What the networks answer",
        ("truth", "dense answers", "dense, %", "pruned answers", "pruned, %", "agree"),
        tuple(
            (
                words(s.truth or ""),
                words(s.dense[0].label),
                _share(s.dense),
                words(s.pruned[0].label),
                _share(s.pruned),
                words("yes" if s.agree else "no"),
            )
            for s in answers.samples
        ),
        (told_of_pictures(answers),),
        text_columns=(0, 1, 3, 5),
    )


def told_of_pictures(answers: Answers) -> str:
    """How many answers differ, and which images were chosen."""
    shown = sum(not sample.agree for sample in answers.samples)
    if not answers.differing:
        return f"Dense and pruned have the same first answer on all of {answers.images:,} validation images."
    which = "all of them" if shown == answers.differing else f"{shown} of them"
    agreeing = len(answers.samples) - shown
    rest = f", then {agreeing} with the same answer" if agreeing else ""
    return (
        f"Dense and pruned have different first answers on {answers.differing:,} of {answers.images:,} validation "
        f"images. Shown: {which}{rest}. Both networks in fp32; percent is the probability that a network gives."
    )


def classes(report: Report) -> Section:
    """Accuracy of every class, the worst changes first."""
    answers = report.answers
    if answers is None or not answers.classes:
        return Section("classes", "Accuracy of every class")
    fewest = min(one.images for one in answers.classes)
    remarks = [
        f"First answers in fp32 on {answers.images:,} validation images, the worst changes first. With {fewest} images "
        f"in the smallest class, one image is {100 / fewest:.1f} points: a change is certain only where its "
        "95 % interval leaves out 0, and one of 20 classes looks so by chance.",
    ]
    if answers.classes_left_out:
        remarks.append(f"{answers.classes_left_out:,} classes that changed less are not listed.")
    return Section(
        "classes",
        "Accuracy of every class",
        ("class", "images", "dense, %", "pruned, %", "points", "95 % interval"),
        tuple(
            (
                words(one.name),
                count(one.images),
                percent(100 * one.dense / one.images),
                percent(100 * one.dense / one.images + one.change),
                points(one.change),
                words(" to ".join(map(signed, change_interval(one.lost, one.won, one.images)))),
            )
            for one in answers.classes
        ),
        tuple(remarks),
        sortable=True,
        shown=CLASSES_SHOWN if len(answers.classes) > _FOLDED_FROM else None,
        bars=tuple(
            Bar(one.dense / one.images, (one.dense - one.lost + one.won) / one.images) for one in answers.classes
        ),
    )


def learning(report: Report) -> Section:
    """The fine-tune, an epoch a row."""
    remark = "Loss is what training minimised, over the training images; accuracy is of the validation images."
    return Section(
        "learning",
        "Fine-tuning",
        ("epoch", "loss", "top-1, %", "agreement, %", "seconds"),
        tuple(
            (count(e.epoch), Cell(f"{e.loss:.4g}", e.loss), percent(e.top1), percent(e.agreement), seconds(e.seconds))
            for e in report.learning
        ),
        (remark,) if report.learning else (),
        text_columns=(),
    )


def _share(answers: Sequence[Answer]) -> Cell:
    return Cell(f"{answers[0].percent:.1f}", answers[0].percent)
