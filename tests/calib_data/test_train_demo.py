"""The script that made the demo weights: a continued training ends as the uninterrupted one."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from benchmarks.train_demo import Settings, Training, train

TINY = Settings(size=32, train_images=48, val_images=12, epochs=2, warmup_steps=1, batch_size=12)


def test_a_killed_training_continues_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TINY, tmp_path / "whole")
    run_epoch = Training.run_epoch

    def die_in_the_second(self: Training, *pictures: torch.Tensor) -> float:
        if self.epoch == 1:
            raise KeyboardInterrupt
        return run_epoch(self, *pictures)

    monkeypatch.setattr(Training, "run_epoch", die_in_the_second)
    try:
        train(TINY, tmp_path / "killed")
    except KeyboardInterrupt:
        monkeypatch.undo()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    train(TINY, tmp_path / "killed")
    capsys.readouterr()

    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]
    assert timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).num_classes == 12


def test_training_ends_early_when_it_is_good_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(dataclasses.replace(TINY, stop_at_top1=0.1, epochs=50), tmp_path)
    capsys.readouterr()
    assert json.loads((tmp_path / "train.json").read_text())["epochs"] < 5
