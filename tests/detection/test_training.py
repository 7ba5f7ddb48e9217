"""Training goes on where it was stopped, and its checkpoints hold nothing but tensors and plain values."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.detection.conftest import small_config
from upvits.calib_data.errors import UserError
from upvits.detection import configs, openmm
from upvits.detection.coco import CocoData
from upvits.detection.detector import DetectorInfo, save_detector
from upvits.detection.training import imitation, train_detector

pytestmark = pytest.mark.usefixtures("mmdet")
SCHEDULE = configs.Schedule(epochs=3, batch_size=4, lr=5e-3, scale=(64, 64), warmup=2, workers=0)


def test_stopped_training_goes_on(
    folders: dict[str, Path], data: CocoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_config(folders["uniform"], len(data.classes))
    straight = train_detector(model, data, SCHEDULE, tmp_path / "straight")
    assert set(straight.history) == {1, 2, 3}
    assert straight.history[3]["loss"] < straight.history[1]["loss"]

    real = openmm.progress_hook

    def stopping(advance: Any) -> Any:
        def until_the_third(epoch: int, step: int, steps: int, losses: dict[str, float]) -> None:
            advance(epoch, step, steps, losses)
            if epoch == 2:
                raise KeyboardInterrupt

        return real(until_the_third)

    monkeypatch.setattr(openmm, "progress_hook", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_detector(model, data, SCHEDULE, tmp_path / "stopped")
    monkeypatch.undo()
    checkpoint = openmm.last_checkpoint(tmp_path / "stopped")
    assert checkpoint is not None
    state = torch.load(checkpoint.path, weights_only=True)
    assert state["meta"]["epoch"] == 2
    resumed = train_detector(model, data, SCHEDULE, tmp_path / "stopped")
    assert set(resumed.history) == {1, 2, 3}
    assert resumed.history[1] == straight.history[1]
    ends = [torch.load(tmp_path / name / "epoch_3.pth", weights_only=True) for name in ("straight", "stopped")]
    assert ends[0]["param_schedulers"] == ends[1]["param_schedulers"]
    assert resumed.history[3]["loss"] == pytest.approx(straight.history[3]["loss"], rel=0.2)  # flips are drawn anew


def test_the_pyramid_can_be_imitated(folders: dict[str, Path], data: CocoData, tmp_path: Path) -> None:
    teacher: Any = openmm.build_detector(small_config(folders["dense"], len(data.classes)))
    images = torch.randn(2, 3, 64, 64)
    assert float(imitation(teacher, 1.0)(teacher.extract_feat(images), images)["loss_imitation"]) < 1e-6
    student: Any = openmm.build_detector(small_config(folders["uniform"], len(data.classes)))
    gap = imitation(teacher, 1.0)(student.extract_feat(images), images)["loss_imitation"]
    assert 0.1 < float(gap) < 2
    info = DetectorInfo(small_config(folders["dense"], 12), data.classes, data.category_ids, (64, 64))
    save_detector(teacher, info, tmp_path / "teacher")
    trained = train_detector(
        small_config(folders["uniform"], len(data.classes)), data, SCHEDULE, tmp_path / "w",
        teacher=tmp_path / "teacher", distill_weight=5.0, options={"train_cfg.max_epochs": 2},
    )  # fmt: skip
    assert set(trained.history) == {1, 2}
    assert trained.history[2]["loss_imitation"] < trained.history[1]["loss_imitation"]
    assert not any("teacher" in name for name in trained.detector.state_dict())
    assert "loss" not in vars(trained.detector)
    assert not trained.detector.get_submodule("neck")._forward_hooks


def test_fine_tuning_starts_from_the_detector_that_is_given(
    folders: dict[str, Path], data: CocoData, tmp_path: Path
) -> None:
    model = small_config(folders["uniform"], len(data.classes))
    torch.manual_seed(5)
    start = openmm.build_detector(model)
    save_detector(start, DetectorInfo(model, data.classes, data.category_ids, (64, 64)), tmp_path / "start")
    still = configs.Schedule(epochs=1, batch_size=4, lr=1e-12, scale=(64, 64), warmup=1, workers=0)
    trained = train_detector(model, data, still, tmp_path / "w", start=tmp_path / "start")
    for name, weights in trained.detector.state_dict().items():
        assert torch.allclose(weights, start.state_dict()[name], atol=1e-6), name


def test_a_training_goes_on_with_as_many_processes(folders: dict[str, Path], data: CocoData, tmp_path: Path) -> None:
    model = small_config(folders["uniform"], len(data.classes))
    train_detector(model, data, SCHEDULE, tmp_path / "w", options={"train_cfg.max_epochs": 1})
    (tmp_path / "w/processes").write_text("8")
    with pytest.raises(UserError, match="begun by 8 processes, and is continued by 1"):
        train_detector(model, data, SCHEDULE, tmp_path / "w")


def test_what_a_training_starts_from_has_to_fit(folders: dict[str, Path], data: CocoData, tmp_path: Path) -> None:
    model = small_config(folders["uniform"], len(data.classes))
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_text("hello")
    torch.save({1: torch.zeros(2), "state_dict": [1]}, tmp_path / "list.pth")
    torch.save({1: torch.zeros(2)}, tmp_path / "number.pth")
    (tmp_path / "w").mkdir()
    (tmp_path / "w/epoch_x.pth").touch()  # nothing that mmengine writes
    os.mkfifo(tmp_path / "w/epoch_9.pth")
    for name, message in {"other": "none of the weights", "torn": "no checkpoint of tensors",
                          "list": "none of the weights", "number": "none of the weights"}.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            train_detector(model, data, SCHEDULE, tmp_path / "w", options={"load_from": str(tmp_path / f"{name}.pth")})
    train_detector(model, data, SCHEDULE, tmp_path / "first", options={"train_cfg.max_epochs": 2})
    start = {"load_from": str(tmp_path / "first/epoch_2.pth")}
    train_detector(model, data, SCHEDULE, tmp_path / "w", options={**start, "train_cfg.max_epochs": 1})
    elsewhere = {"train_dataloader.dataset.ann_file": "http://localhost:1/x.json"}
    with pytest.raises(UserError, match="cannot build what `options=` asks for"):
        train_detector(model, data, SCHEDULE, tmp_path / "v", options=elsewhere)
    resumed = train_detector(model, data, SCHEDULE, tmp_path / "w", options=start)
    assert set(resumed.history) == {1, 2, 3}  # from its own checkpoint, not from the one it began with


def test_a_torn_checkpoint_is_passed_over(folders: dict[str, Path], data: CocoData, tmp_path: Path) -> None:
    model = small_config(folders["uniform"], len(data.classes))
    train_detector(model, data, SCHEDULE, tmp_path / "w", options={"train_cfg.max_epochs": 2})
    newest = openmm.last_checkpoint(tmp_path / "w")
    assert newest is not None
    newest.path.write_bytes(newest.path.read_bytes()[:1000])
    history = json.loads((tmp_path / "w/history.json").read_text())
    (tmp_path / "w").rename(tmp_path / "moved")
    assert openmm.last_checkpoint(tmp_path / "moved") == (1, tmp_path / "moved/epoch_1.pth")
    resumed = train_detector(model, data, SCHEDULE, tmp_path / "moved")
    assert set(resumed.history) == {1, 2, 3}
    assert resumed.history[1] == history["1"]
    assert resumed.history[2] != history["2"]  # made again


def test_the_warm_up_fits_the_training(folders: dict[str, Path], data: CocoData) -> None:
    model = small_config(folders["uniform"], len(data.classes))

    def warm_up(epochs: int, processes: int) -> int:
        schedule = configs.Schedule(epochs=epochs, batch_size=2, lr=1e-3, scale=(64, 64), warmup=500)
        values = configs.training(model, data, schedule, work_dir="w", seed=0, gpu=False, processes=processes)
        return int(values["param_scheduler"][0]["end"])

    assert data.train.count == 12
    assert warm_up(8, 1) == 12  # a quarter of 48 steps
    assert warm_up(8, 2) == 6
    assert warm_up(1, 2) == 2  # one step of it would never end
    assert warm_up(1000, 1) == 500
