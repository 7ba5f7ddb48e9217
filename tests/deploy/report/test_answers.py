"""Pictures, classes and the learning curve in the views; words that are explained where they stand."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.deploy.report.sample_report import answers, sample_document, sample_report
from tests.deploy.report.test_report_views import Page, printed
from upvits.deploy.measure.uncertainty import change_interval
from upvits.deploy.report.answers import Answers
from upvits.deploy.report.document import Report, load_report
from upvits.deploy.report.views import html, markdown, sections
from upvits.deploy.report.views.answers import told_of_pictures
from upvits.deploy.report.views.curves import learning_curves
from upvits.deploy.report.views.page import chapters
from upvits.deploy.report.views.section import signed
from upvits.deploy.report.views.terms import TERMS, explained, terms_in


def flat(text: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", text).replace("&nbsp;", " ").split())


def test_older_reports_have_no_pictures_and_are_still_shown(tmp_path: Path) -> None:
    document = sample_document()
    del document["answers"], document["learning"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    report = load_report(tmp_path)
    assert {s.key for s in sections(report)}.isdisjoint({"pictures", "classes", "learning"})
    assert 'class="samples"' not in html(report)


def test_the_verdict_chart_pictures_and_classes_come_before_what_is_folded() -> None:
    page = html(sample_report())
    places = [page.index(part) for part in ('class="verdict"', "Accuracy over latency", 'class="samples"',
                                            "Accuracy of every class", "Fine-tuning", "Everything else",
                                            'class="chapter fold"')]  # fmt: skip
    assert places == sorted(places)
    assert "<details open" not in page
    assert [c.key for c in chapters(sample_report()) if c.open] == ["chapter-classes", "chapter-learning"]


def test_pictures_show_both_answers_and_who_is_right() -> None:
    page = html(sample_report())
    cards = [flat(card) for card in page.split('<li class="sample')[1:]]
    assert len(cards) == 3
    assert "Truth: plain disk different answers dense right plain disk 70.0 % plain cross 23.3 %" in cards[0]
    assert "pruned wrong plain square 70.0 %" in cards[0]
    assert "dense wrong" in cards[1]
    assert "pruned right" in cards[1]
    assert "same answer" in cards[2]
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert "24 of 1,600 validation images. Shown: 2 of them, then 1 with the same answer" in flat(page)
    assert "| plain disk | plain disk | 70.0 | plain square | 70.0 | no |" in markdown(sample_report())


def test_without_labels_there_are_answers_and_no_truth() -> None:
    values = answers()
    for sample in values["samples"]:
        sample["truth"] = None
    report = sample_report(answers={**values, "classes": []})
    page = html(report)
    assert "Truth" not in page
    assert ">right<" not in page
    assert ">wrong<" not in page
    assert "plain square" in page
    found = {section.key: section for section in sections(report)}
    assert "classes" not in found
    assert "truth" not in found["pictures"].header


def test_classes_come_with_their_counts_and_the_interval_of_their_change() -> None:
    (found,) = (s for s in sections(sample_report()) if s.key == "classes")
    low, high = change_interval(lost=6, won=0, images=100)
    assert [cell.text for cell in found.rows[0]] == [
        "plain disk", "100", "98.00", "92.00", signed(-6.0), f"{signed(low)} to {signed(high)}"]  # fmt: skip
    assert found.shown == 8 < len(found.rows) == 16
    assert (found.bars[0].dense, found.bars[0].pruned) == (0.98, 0.92)
    few = sample_report(answers={**answers(), "classes": answers()["classes"][:12], "classes_left_out": 3})
    (found,) = (s for s in sections(few) if s.key == "classes")
    assert found.shown is None
    assert "3 classes that changed less are not listed." in found.remarks


def test_no_difference_is_said_in_words() -> None:
    told = told_of_pictures(Answers.model_validate({**answers(), "differing": 0}))
    assert told == "Dense and pruned have the same first answer on all of 1,600 validation images."


def test_the_learning_curve_begins_before_training_and_ends_at_the_last_epoch() -> None:
    accuracy, loss = learning_curves(sample_report())
    assert [dot.text for dot in accuracy.dots] == [
        "before fine-tuning: 94.83 %", "epoch 1: 97.00 %", "epoch 2: 97.50 %", "epoch 3: 98.00 %"]  # fmt: skip
    heights = [dot.y for dot in accuracy.dots]
    assert heights == sorted(heights, reverse=True)  # better is further up
    assert accuracy.level is not None
    assert accuracy.level < heights[-1]  # dense is above
    assert [dot.text for dot in loss.dots] == ["epoch 1: 12.3", "epoch 2: 6.15", "epoch 3: 4.1"]
    assert len(loss.lines) == 2


def test_a_short_or_unlabelled_fine_tune_has_the_curves_that_it_can_have() -> None:
    document = sample_document()
    one = document["learning"][:1]
    assert len(learning_curves(sample_report(learning=one))) == 1  # before and after; a single loss is no curve
    unlabelled = [{**e, "top1": None, "agreement": 90.0 + e["epoch"]} for e in document["learning"]]
    curve, _ = learning_curves(sample_report(learning=unlabelled))
    assert curve.level is None
    assert curve.title.startswith("Agreement")
    assert learning_curves(sample_report(learning=[])) == []
    unjudged = sample_report(learning=[{**one[0], "top1": None}])
    assert [c.open for c in chapters(unjudged) if c.key == "chapter-learning"] == [False]


HOSTILE = "<img src=x onerror=alert(1)>&\"'"


def test_names_of_classes_are_escaped_wherever_they_stand() -> None:
    values = answers()
    values["classes"][0]["name"] = HOSTILE
    values["samples"][0]["truth"] = values["samples"][0]["dense"][0]["label"] = HOSTILE
    report = sample_report(answers=values)
    page = html(report)
    assert "<img src=x" not in page
    assert HOSTILE in "".join(Page(page).text)
    assert not re.search("<img", markdown(report))


@pytest.mark.parametrize("image", ['x" onload="alert(1)', "javascript:x", "a" * (65 << 10)])
def test_pictures_are_small_and_nothing_but_base64(image: str) -> None:
    values = answers()
    values["samples"][0]["image"] = image
    with pytest.raises(ValidationError):
        Report.model_validate({**sample_document(), "answers": values})


def test_words_are_explained_where_they_stand_and_in_a_list() -> None:
    assert explained("SQNR, dB") == f'<abbr title="{TERMS["SQNR"]}">SQNR</abbr>, dB'
    assert explained("<b> CVs & batch") == "&lt;b&gt; CVs &amp; batch"  # a part of a word is no term
    assert [term for term, _ in terms_in("KL to dense, nats", "top-1, %")] == ["dense", "KL", "nats", "top-1"]
    page, text = html(sample_report()), markdown(sample_report())
    for term in ("SQNR", "nats", "parity", "MACs", "p90", "95 % interval", "CV"):
        assert f"<dt>{term}</dt>" in page
        assert f"- {term}: {TERMS[term]}" in text


def test_no_sentence_speaks_of_slashes_and_columns_with_two_figures_say_which_is_which() -> None:
    assert "lash" not in printed(sample_report()) + markdown(sample_report())
    (found,) = (s for s in sections(sample_report()) if s.key == "latency")
    for name, cell in zip(found.header, found.rows[0], strict=True):
        assert ("dense / pruned" in name) == (" / " in cell.text)
