"""What a training will take, and what is seen of one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.toolchain.training.tiny_training import preprocess, source, tiny_vit
from upvits.toolchain.training.distillation import distill
from upvits.toolchain.training.forecast import forecast
from upvits.toolchain.training.progress import training_progress
from upvits.toolchain.training.settings import DistillSettings

SETTINGS = DistillSettings(epochs=3, batch_size=16, accumulation=2, warmup_epochs=0, eval_every=2)


def test_a_forecast_reckons_from_real_steps_and_changes_nothing() -> None:
    student, teacher, data = tiny_vit(1), tiny_vit(0), source(96)
    before = [parameter.clone() for parameter in student.parameters()]
    found = forecast(student, teacher, data, preprocess(), SETTINGS, device="cpu")
    assert (found.epochs, found.steps_per_epoch, found.batch_size, found.accumulation) == (3, 6, 16, 2)
    assert found.measured_steps == 6  # all that an epoch has
    steps = 3 * 6 * found.step_seconds
    assert found.seconds == pytest.approx(steps + 2 * found.evaluation_seconds)
    assert found.images_per_s == pytest.approx(16 / found.step_seconds)
    assert 50 < found.memory_mb < 20_000
    assert all(torch.equal(*pair) for pair in zip(before, student.parameters(), strict=True))


def test_a_log_gets_a_line_for_every_epoch(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, "upvits"):
        distill(tiny_vit(1), tiny_vit(0), source(64), preprocess(), SETTINGS, tmp_path, device="cpu", quiet=False)
    lines = [record.message for record in caplog.records if record.message.startswith("epoch")]
    assert len(lines) == 3
    assert lines[0].startswith("epoch 1/3: loss ")
    assert "top-1" not in lines[0]
    assert "top-1" in lines[1]
    assert lines[2].endswith("0:00:00 left")
    assert all(len(line) < 80 for line in lines)


def test_a_long_epoch_is_seen_in_between(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("upvits.toolchain.training.progress.time.monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, "upvits"), training_progress(2, 100, 100, 32, quiet=False) as shown:
        assert shown is not None
        looks = [shown.due]
        clock[0] = 61.0
        looks.append(shown.due)
        assert looks == [False, True]
        shown.step(2, 61, 0.5)
    assert [record.message for record in caplog.records] == [
        "epoch 2/2: loss 0.500, 32 images/s, 0:00:39 left, step 61 of 100"
    ]
    with training_progress(2, 100, 0, 32, quiet=True) as hidden:
        assert hidden is None
