"""What a training keeps beside its checkpoint: the weights of its best epoch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.toolchain.training.tiny_training import source, train
from upvits.toolchain.training.settings import DistillSettings
from upvits.toolchain.training.state import EpochLog, best_epoch

distillation: Any = importlib.import_module("upvits.toolchain.training.distillation")
SETTINGS = DistillSettings(epochs=4, batch_size=32, lr=8e-3, warmup_epochs=1, eval_every=1)


def epoch(number: int, top1: float | None, agreement: float | None = None) -> EpochLog:
    return EpochLog(number, 1e-3, 1.0, 1.0, 0.0, 0.0, top1, agreement, 1.0, 1.0)


def test_the_best_epoch_is_the_last_of_equal_ones() -> None:
    history = [epoch(1, 50.0), epoch(2, 70.0), epoch(3, None), epoch(4, 70.0), epoch(5, 60.0)]
    assert best_epoch(history) is history[3]
    assert best_epoch(history[:3]) is history[1]
    assert best_epoch([epoch(1, None, 80.0), epoch(2, None, 75.0)]) == epoch(1, None, 80.0)
    assert best_epoch([epoch(1, None)]) is None
    assert best_epoch([]) is None


def judged(top1: list[float], seen: dict[float, dict[str, Tensor]]) -> Any:
    """Stands for the accuracy on validation images, and keeps what was judged."""
    left = iter(top1)

    def validate(run: Any, reference: Tensor | None) -> tuple[float, None]:
        found = next(left)
        seen[found] = {name: tensor.clone() for name, tensor in run.state.ema.state_dict().items()}
        return found, None

    return validate


def equal(path: Path, tensors: dict[str, Tensor]) -> bool:
    kept = load_file(path)
    return kept.keys() == tensors.keys() and all(kept[name].equal(tensors[name]) for name in kept)


def test_weights_of_the_best_epoch_are_kept_and_the_last_ones_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[float, dict[str, Tensor]] = {}
    monkeypatch.setattr(distillation, "_validate", judged([50.0, 71.0, 60.0, 55.0], seen))
    result = train(tmp_path, SETTINGS, source())
    assert equal(tmp_path / "best.safetensors", seen[71.0])
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert file.metadata() == {"epoch": "2", "accuracy": "71.000"}
    assert all(tensor.equal(seen[55.0][name]) for name, tensor in result.model.state_dict().items())


def test_killed_between_checkpoint_and_best_weights_they_are_written_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[float, dict[str, Tensor]] = {}
    monkeypatch.setattr(distillation, "_validate", judged([50.0, 71.0], seen))
    with monkeypatch.context() as patch:
        kept = distillation.keep_best

        def killed(path: Path, state: Any) -> None:
            if len(state.history) == 2:
                raise KeyboardInterrupt
            kept(path, state)

        patch.setattr(distillation, "keep_best", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, SETTINGS, source())
    assert equal(tmp_path / "best.safetensors", seen[50.0])
    monkeypatch.setattr(distillation, "_validate", judged([60.0, 55.0], seen))
    train(tmp_path, SETTINGS, source())
    assert equal(tmp_path / "best.safetensors", seen[71.0])


def test_what_was_not_judged_has_no_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"of another training")
    monkeypatch.setattr(distillation, "_validate", lambda run, reference: (None, None))
    train(tmp_path, SETTINGS, source())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]
