"""`bench` on the command line, and how the program ends when it is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy.conftest import Exported
from upvits.deploy.cli import app as cli

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "from upvits.deploy.cli.app import main; main()"


def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(
    vit: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*arguments: object, **more: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("upvits.deploy.measure.compare.compare", measure)
    content = vit.report.path.read_bytes()
    for output in (vit.report.path, tmp_path / "nowhere" / "y.json", tmp_path):
        monkeypatch.setattr("sys.argv", ["upvits-deploy", "bench", str(vit.report.path), "-o", str(output)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert "Error:" in capsys.readouterr().err
    assert vit.report.path.read_bytes() == content


@pytest.mark.parametrize(
    ("command", "continues"), [("build", True), ("export", True), ("plan", False), ("bench", False), ("report", False)]
)
def test_only_what_continues_is_said_to(
    command: str, continues: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise SystemExit(130)

    monkeypatch.setattr("sys.argv", ["upvits-deploy", command, "x"])
    monkeypatch.setattr(cli, "app", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        cli.main()
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr().err
    assert "Interrupted." in said
    assert ("continues" in said) is continues


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM that can be caught")
def test_a_terminated_bench_leaves_nothing_behind(vit: Exported, tmp_path: Path) -> None:
    arguments = ["bench", str(vit.report.path), "--seconds", "60", "--runtime", "onnxruntime", "--threads", "1", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment)
    try:
        ends = time.monotonic() + 60
        while not list(tmp_path.glob("upvits-*/*/build.json")) and time.monotonic() < ends:
            time.sleep(0.1)
        assert list(tmp_path.glob("upvits-*/*/build.json"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert list(tmp_path.glob("upvits-*")) == []
