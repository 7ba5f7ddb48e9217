"""Killed at any stage, the same command continues and ends with the same report."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.robustness.case import draw_photos, save_network
from tests.forked import exit_codes, start_command

STAGES = (
    "0-dense", "1-score", "2-prune", "3-distill", "4-export", "4-precision/int8-fp32", "5-engine/onnxruntime-fp32",
    "5-engine/onnxruntime-int8", "6-bench",
)  # fmt: skip
TIMES = {
    "latency_ms", "speedup", "speedup_low", "speedup_high", "stages", "seconds", "load_average", "best", "layer_times",
    "findings", "threads", "reproduce",
}  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A small ViT on small pictures; two epochs, so that there is something to kill."""
    draw_photos(tmp_path / "photos", train=48, val=8)
    save_network(tmp_path / "dense")
    return [
        "build", "-m", "deit_tiny", "-r", "0.5", "--weights", str(tmp_path / "dense"), "--data",
        f"imagefolder:{tmp_path / 'photos'}", "--epochs", "2", "--batch-size", "16", "--allow-weak",
        "--runtime", "onnxruntime", "--bench-seconds", "0.2", "--calib-images", "16", "--max-drop", "100", "--quiet",
    ]  # fmt: skip


def run_through(arguments: list[str], out: Path) -> None:
    process = start_command([*arguments, "-o", str(out)], out.with_suffix(".txt"))
    assert exit_codes([process]) == [0], out.with_suffix(".txt").read_text()


def kill_in(stage: str, arguments: list[str], out: Path) -> None:
    """Start, wait for the stage's work folder, kill -9."""
    process = start_command([*arguments, "-o", str(out)], out.with_suffix(".txt"))
    final = out / stage
    deadline = time.monotonic() + 300
    while process.is_alive() and time.monotonic() < deadline:
        if list(final.parent.glob(f".{final.name}.work-*")):
            time.sleep(0.05)
            break
        time.sleep(0.002)
    process.kill()
    assert exit_codes([process]) == [-signal.SIGKILL], f"{stage} was over before it could be killed"
    assert not (out / "report.json").exists(), f"{stage} was over before it could be killed"


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_report(arguments: list[str], tmp_path: Path) -> None:
    run_through(arguments, tmp_path / "straight")
    for stage in STAGES:
        kill_in(stage, arguments, tmp_path / "killed")
    run_through(arguments, tmp_path / "killed")
    straight, killed = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("straight", "killed"))
    assert without_times(killed) == without_times(straight)
    assert [stage["name"] for stage in killed["stages"]] == list(STAGES)
    weights = [(tmp_path / name / "3-distill/model/model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert weights[0] == weights[1]
    leftovers = [path for path in (tmp_path / "killed").rglob("*") if ".work-" in path.name or path.suffix == ".tmp"]
    assert leftovers == []
