"""A sample of the campaign in benchmarks/robustness."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from benchmarks.robustness.case import Case, Ground, Outcome, prepare
from benchmarks.robustness.driver import judged, touched
from benchmarks.robustness.mutations import mutated, no_documents, places, replaced, written

PARTS = (
    "options", "recipes", "reports", "model folders", "safetensors", "pickles", "graphs", "pictures", "shards",
    "opened data", "hugging face",
    "tables", "payloads",
)  # fmt: skip
"""Those whose cases need no process of their own and no build."""
SHARE = "0.012"


@pytest.mark.slow
def test_hostile_inputs_end_in_the_right_result_or_in_one_message(tmp_path: Path, repository: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.robustness",
        "--share",
        SHARE,
        "--only",
        ",".join(PARTS),
    ]
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "figures.json")]
    ended = subprocess.run([*command, *places], cwd=repository, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["part"] for row in rows] == list(PARTS)
    assert all(row["tried"] for row in rows)
    assert not any(row["wrong"] for row in rows)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    made = Ground(tmp_path)
    prepare(made)
    made.case.mkdir()
    return made


def test_what_is_wrong_is_seen(ground: Ground) -> None:
    case = Case("", lambda here: [], "refused")
    assert judged(case, Outcome(2, "", "Error: x", 1.0), ground) == []
    assert judged(case, Outcome(0, "", "", 1.0), ground) == ["was accepted"]
    assert judged(case, Outcome(70, "", "Error: x", 1.0), ground) == ["exit code 70"]
    assert judged(case, Outcome(-9, "", "", 1.0, "hangs"), ground) == ["hangs"]
    assert judged(case, Outcome(-11, "", "", 1.0), ground) == ["ended by signal 11"]
    assert judged(case, Outcome(2, "\x1b[31m", "Error: x", 1.0), ground) == ["a control character reaches the terminal"]
    assert judged(case, Outcome(2, "", "", 1.0), ground) == ["no message"]


def test_what_was_touched_is_seen_and_put_right(ground: Ground) -> None:
    assert touched(ground) == []
    (ground.case / ground.marker.name).touch()
    (ground.precious / "notes.txt").write_text("yours")
    (ground.work / "escaped").touch()
    (ground.temporary / "upvits-x").mkdir()
    assert len(touched(ground)) == 4
    (ground.temporary / "upvits-x").rmdir()
    assert touched(ground) == []


def test_a_mutation_is_one_change_and_the_same_for_the_same_seed() -> None:
    document = {"a": {"b": [1, 2.5, "x"]}, "c": None}
    assert [at for at, _ in places(document)] == [
        ("a",),
        ("a", "b"),
        ("a", "b", 0),
        ("a", "b", 1),
        ("a", "b", 2),
        ("c",),
    ]
    assert replaced(document, ("a", "b", 1), 7) == {"a": {"b": [1, 7, "x"]}, "c": None}
    first, second = ([mutated(document, random) for _ in range(300)] for random in (Random(3), Random(3)))
    assert list(map(str, first)) == list(map(str, second))
    assert document == {"a": {"b": [1, 2.5, "x"]}, "c": None}
    assert sum(changed != document for _, changed in first) > 280  # a value may be drawn that was there
    assert all(written(changed) for _, changed in first)
    assert len({what for what, _ in first}) > 150


def test_bytes_that_are_no_document_are_none() -> None:
    for what, raw in no_documents(b'{"a": 1}').items():
        try:
            read = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        assert not isinstance(read, dict) or what in ("an empty object", "UTF-16", "a mark of byte order"), what
