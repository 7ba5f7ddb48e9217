"""Measuring steps in processes of their own: what is counted, and how limits end them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import large_networks
from benchmarks.large_networks import main, measured, network


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("x = bytearray(200_000_000); import time; time.sleep(2)", "done"),
        ("raise SystemExit(3)", "failed with 3"),
        ("x = bytes(400_000_000).replace(b'\\0', b'\\1'); import time; time.sleep(60)", "more than 0.3 GB"),
        ("import time; time.sleep(60)", "more than 0.02 minutes"),
    ],
)
def test_a_process_is_measured_and_ended(code: str, ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_networks, "LOOK_SECONDS", 0.05)
    minutes = 0.02 if "minutes" in ended else 5
    found = measured([sys.executable, "-c", code], limit_gb=0.3, minutes=minutes)
    assert found["ended"] == ended
    assert found["seconds"] < 50
    if ended == "done":
        assert 0.2 <= found["peak_gb"] < 0.3
        assert found["cpu_seconds"] > 0


def test_rows_are_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def pretend(command: list[str], *_: float) -> dict[str, Any]:
        asked.append(json.loads(command[-1]))
        return {"ended": "done"}

    monkeypatch.setattr(large_networks, "measured", pretend)
    out = tmp_path / "rows.json"
    options = ["x", "--networks", "pvt_v2_b0,deit_s", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*options, "--stages", "cut"])
    main()
    main()
    assert [(step["name"], step["images"]) for step in asked] == [("pvt_v2_b0", 512), ("deit_s", 512)]
    monkeypatch.setattr(sys, "argv", [*options, "--stages", "cut,plan"])
    main()
    assert len(json.loads(out.read_text())["rows"]) == len(asked) == 4


def test_fewer_blocks() -> None:
    model: Any = network("deit_s", 1)
    assert len(model.blocks) == 1
