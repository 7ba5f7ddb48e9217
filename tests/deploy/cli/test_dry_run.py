"""`distill --dry-run` says what a training takes, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deploy.cli.test_cli import photos, run
from upvits.deploy.recipe.train_recipe import train_values

__all__ = ["photos"]


def test_a_dry_run_says_what_the_training_takes_and_writes_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    asked = (
        "distill", "--model", "deit_tiny", "--weights", "random", "--image-size", "32", "--allow-weak", "--data",
        f"imagefolder:{photos}", "--ratio", "0.5", "--epochs", "3", "--output", str(tmp_path / "run"), "--dry-run",
    )  # fmt: skip
    code, out, _ = run(capsys, monkeypatch, *asked)
    assert code == 0
    assert "3, of 1 steps each" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    code, out, _ = run(capsys, monkeypatch, *asked, "--json")
    found = json.loads(out)
    assert (code, found["epochs"], found["batch_size"], found["processes"]) == (0, 3, 8, 1)
    assert found["measured_on"] == "a network of the planned widths"
    assert sorted(tmp_path.rglob("*")) == before
    code, _, err = run(capsys, monkeypatch, *asked[:-1], "--epochs", "0", "--dry-run")
    assert code == 2
    assert "Nothing would be trained" in err


def test_a_recipe_from_notepad_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbfepochs = 4\n")
    assert train_values(str(tmp_path / "mine.toml"), 100) == {"epochs": 4}
