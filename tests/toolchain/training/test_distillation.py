"""Distillation: the loss by hand, the recipe's details, and that killing or splitting a training changes nothing."""

import importlib
import json
import math
import os
import signal
import socket
from dataclasses import replace
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import DropPath
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn

from tests import forked
from tests.toolchain.training.tiny_training import damaged, preprocess, run, source, tiny_vit, train
from upvits.calib_data import Images, batches
from upvits.calib_data.errors import StoppedError, UserError
from upvits.calib_data.loading import TrainingBatches
from upvits.toolchain.processes.process import Process
from upvits.toolchain.training.distillation import distill
from upvits.toolchain.training.evaluate import evaluate
from upvits.toolchain.training.objective import Outputs, losses, mixed, mixing_of
from upvits.toolchain.training.settings import DistillSettings
from upvits.toolchain.training.teacher import Teacher

distill_module: Any = importlib.import_module("upvits.toolchain.training.distillation")
objective: Any = importlib.import_module("upvits.toolchain.training.objective")
preparation: Any = importlib.import_module("upvits.toolchain.training.preparation")

SHORT = DistillSettings(epochs=3, batch_size=32, lr=8e-3, warmup_epochs=1, drop_path=0.2)


def same_weights(one: nn.Module | dict[str, Tensor], other: nn.Module | dict[str, Tensor]) -> bool:
    first, second = (item.state_dict() if isinstance(item, nn.Module) else item for item in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """A tiny ViT that knows its colours."""
    settings = DistillSettings(
        epochs=12, batch_size=32, lr=4e-2, warmup_epochs=1, logit_weight=0, cutmix=0, drop_path=None, eval_every=12
    )
    result = distill(tiny_vit(0), tiny_vit(0), source(192), preprocess(), settings, device="cpu")
    assert result.history[-1].top1 is not None
    assert result.history[-1].top1 > 95
    return result.model


# --- one batch ---------------------------------------------------------------------------------------------------


def test_losses_are_the_papers() -> None:
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(3, 5)) * 3, rng.normal(size=(3, 5)) * 3
    f, g = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    labels, share = [4, 0, 2], 0.7

    def probabilities(logits: np.ndarray) -> np.ndarray:
        shares: np.ndarray[Any, np.dtype[Any]] = np.exp(logits) / np.exp(logits).sum()
        return shares

    label_loss = logit_loss = 0.0
    for i in range(3):
        p, q = probabilities(t[i]), probabilities(z[i])
        label_loss += -share * math.log(q[labels[i]]) - (1 - share) * math.log(q[labels[2 - i]])
        logit_loss += sum(p[c] * math.log(p[c] / q[c]) for c in range(5))
    student, teacher = (
        Outputs(torch.tensor(logits), torch.tensor(logits), torch.tensor(features), torch.tensor(features))
        for logits, features in ((z, f), (t, g))
    )
    one = torch.eye(5)[labels]
    targets = share * one + (1 - share) * one.flip(0)
    parts = losses(student, teacher, targets, (1.0, 6.4, 0.0, 20.0, 0.0)).tolist()
    assert parts == pytest.approx([label_loss / 3, logit_loss / 3, 0, ((f - g) ** 2).mean(), 0], rel=1e-5)
    assert losses(student, teacher, targets, (0.0, 6.4, 0.0, 0.0, 0.0)).tolist() == pytest.approx(
        [0, logit_loss / 3, 0, 0, 0], rel=1e-5
    )


def test_weighted_sum_and_log(tmp_path: Path) -> None:
    settings = replace(SHORT, epochs=2, feature_weight=20.0, eval_every=2)
    result = train(tmp_path, settings, source())
    first, last = result.history
    assert first.loss == pytest.approx(first.label_loss + 6.4 * first.logit_loss + 20 * first.feature_loss)
    assert min(first.label_loss, first.logit_loss, first.feature_loss) > 0
    assert first.top1 is None
    assert last.top1 is not None
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["top1"] == last.top1
    assert lines[0]["loss"] == first.loss


@pytest.mark.parametrize("batch", [4, 5])
def test_cutmix_shares_are_exact_and_the_larger_part_stays(batch: int) -> None:
    before = torch.arange(batch).float().reshape(-1, 1, 1, 1).expand(-1, 3, 13, 10).contiguous()
    mixing = mixing_of(DistillSettings(cutmix=0.5), batch)
    labels, shares = torch.arange(batch), []
    np.random.seed(0)
    for _ in range(300):
        images, targets = mixed(mixing, before.clone(), labels)
        for place in range(batch):
            seen = torch.stack([(images[place] == label).float().mean() for label in range(batch)])
            assert targets[place].tolist() == pytest.approx(seen.tolist(), abs=1e-6)
        shares.append(float(targets[0, 0]))
    assert min(shares) >= 0.5
    assert max(shares) > 0.95
    assert min(shares) < 0.7


def test_without_mixing_images_stay_and_targets_are_the_smoothed_labels() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([1, 0, -1, 2])
    mixing = mixing_of(DistillSettings(cutmix=0, label_smoothing=0.3), 3)
    same, targets = mixed(mixing, images.clone(), labels)
    assert torch.equal(same, images)
    assert targets[0].tolist() == pytest.approx([0.1, 0.8, 0.1])


def test_mixup_blends_both_images_and_labels() -> None:
    before = torch.arange(4).float().reshape(-1, 1, 1, 1).expand(-1, 3, 6, 6).contiguous()
    np.random.seed(1)
    images, targets = mixed(mixing_of(DistillSettings(cutmix=0, mixup=0.8), 4), before.clone(), torch.arange(4))
    assert images.mean(dim=(1, 2, 3)).tolist() == pytest.approx((targets @ torch.arange(4.0)).tolist(), abs=1e-5)
    assert 0 < targets[0, 3] <= 0.5


def test_both_models_see_the_same_mixed_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, Tensor]] = []
    original = objective.outputs

    def spy(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((model.training, images))
        result: tuple[Tensor, Tensor] = original(model, images)
        return result

    monkeypatch.setattr(objective, "outputs", spy)
    monkeypatch.setattr("upvits.toolchain.training.teacher.outputs", spy)
    batches: list[Tensor] = []

    def mix(*args: Any) -> tuple[Tensor, Tensor]:
        images, targets = mixed(*args)
        batches.append(images)
        return images, targets

    monkeypatch.setattr(distill_module, "mixed", mix)
    train(None, replace(SHORT, epochs=1), source(32))
    (student_training, first), (teacher_training, second) = seen[-2:]
    assert (teacher_training, student_training) == (False, True)
    assert torch.equal(first, batches[0])
    assert torch.equal(second, batches[0])


# --- the recipe --------------------------------------------------------------------------------------------------


def prepare(settings: DistillSettings, **model_options: Any) -> Any:
    student = tiny_vit(1, **model_options)
    return preparation.prepare(
        student, Teacher(tiny_vit(0), preprocess()), source(), preprocess(), settings, torch.device("cpu")
    )


def test_no_decay_on_biases_norms_tokens_and_position() -> None:
    run = prepare(replace(SHORT, feature_weight=20.0, weight_decay=0.25), embed_dim=16)
    names = {parameter: name for name, parameter in run.state.learner.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in run.state.optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == set(names.values())
    free = ("bias", "norm", "cls_token", "pos_embed")
    for name, value in decay.items():
        assert value == (0.0 if any(part in name for part in free) else 0.25), name
    assert decay["projection.weight"] == 0.25


def test_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    run = prepare(DistillSettings(epochs=10, batch_size=32, lr=1e-3, warmup_epochs=2))
    peak = 1e-3 * 32 / 256
    rates = []
    for step in range(30):  # 3 steps an epoch
        run.scheduler.step_update(step)
        rates.append(run.state.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(peak / 100)
    assert rates[3] == pytest.approx(peak / 100 + (peak - peak / 100) / 2)
    assert rates[6] == pytest.approx(peak)
    assert rates[18] == pytest.approx((peak + peak / 100) / 2)
    assert rates[29] == pytest.approx(peak / 100, rel=0.5)
    assert rates == sorted(rates[:7]) + sorted(rates[7:], reverse=True)


def test_drop_path_grows_with_depth_and_is_gone_from_the_result() -> None:
    run = prepare(replace(SHORT, drop_path=0.2))
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in run.state.learner.model.blocks]
    assert rates == [0.0, 0.2]
    result = train(None, replace(SHORT, epochs=1), source())
    assert not any(isinstance(layer, DropPath) for layer in result.model.modules())
    own = prepare(replace(SHORT, drop_path=None), drop_path_rate=0.3).state.learner.model
    assert own.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)


def test_damaged_student_recovers_and_the_average_is_returned(teacher: nn.Module) -> None:
    data = source(192)
    student = damaged(teacher, noise=4.0)
    before = evaluate(student, batches(data.val, preprocess(), 64)).top1
    copies = tiny_vit(), tiny_vit()
    copies[0].load_state_dict(student.state_dict())
    copies[1].load_state_dict(teacher.state_dict())
    state = torch.random.get_rng_state()
    result = distill(student, teacher, data, preprocess(), replace(SHORT, epochs=8), device="cpu")
    accuracy = evaluate(result.model, batches(data.val, preprocess(), 64))
    assert before is not None
    assert accuracy.top1 is not None
    assert accuracy.top1 > before + 20
    assert accuracy.top1 == result.history[-1].top1  # what was measured while training is what is returned
    assert result.history[-1].loss < result.history[0].loss
    assert same_weights(student, copies[0])
    assert same_weights(teacher, copies[1])
    assert torch.equal(state, torch.random.get_rng_state())


def test_returned_weights_are_the_moving_average(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory: list[dict[str, Tensor]] = []
    update = preparation.ModelEmaV3.update

    def spy(self: Any, model: nn.Module, step: int) -> None:
        trajectory.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        update(self, model, step)

    monkeypatch.setattr(preparation.ModelEmaV3, "update", spy)
    result = train(None, SHORT, source())
    assert len(trajectory) == 9
    average = trajectory[0]
    for step, weights in enumerate(trajectory[1:], start=1):
        decay = min(1 - (1 + step) ** (-2 / 3), SHORT.ema_decay)
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-6)
    assert not same_weights(result.model, trajectory[-1])


def test_without_labels_the_teacher_is_enough(teacher: nn.Module) -> None:
    data = source(192, labelled=False)
    student = damaged(teacher, noise=4.0)
    reference = evaluate(teacher, batches(data.val, preprocess(), 64)).predictions
    before = evaluate(student, batches(data.val, preprocess(), 64), reference=reference).agreement
    result = distill(student, teacher, data, preprocess(), replace(SHORT, epochs=8), device="cpu")
    after = evaluate(result.model, batches(data.val, preprocess(), 64), reference=reference)
    last = result.history[-1]
    assert (last.label_loss, last.top1) == (0.0, None)
    assert before is not None
    assert after.agreement is not None
    assert after.agreement > before + 20
    assert last.agreement == after.agreement


# --- models ------------------------------------------------------------------------------------------------------


def test_headless_models_learn_features_of_another_width() -> None:
    student, teacher = tiny_vit(1, embed_dim=16, num_classes=0), tiny_vit(0, num_classes=0)
    settings = replace(SHORT, epochs=4, feature_weight=20.0)
    result = distill(student, teacher, source(), preprocess(), settings, device="cpu")
    first, last = result.history[0], result.history[-1]
    assert last.feature_loss < 0.9 * first.feature_loss
    assert (last.label_loss, last.logit_loss, last.top1, last.agreement) == (0.0, 0.0, None, None)
    assert result.model.state_dict().keys() == student.state_dict().keys()  # the projection is not in it


def test_pvt_with_features_and_distilled_deit() -> None:
    def pvt(width: int) -> nn.Module:
        model: nn.Module = PyramidVisionTransformerV2(
            depths=(1, 1, 1, 1), embed_dims=(width,) * 4, num_heads=(1, 1, 2, 2), mlp_ratios=(2,) * 4, num_classes=4
        )
        return model

    def deit(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = VisionTransformerDistilled(
            img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=4
        )
        return model

    settings = replace(SHORT, epochs=1, feature_weight=20.0, clip_grad=1.0)
    # at 64 px the last stages still attend to several tokens: with a single one, queries have no gradient
    for student, teacher, size in ((pvt(8), pvt(16), 64), (deit(0), deit(1), 32)):
        result = distill(student, teacher, source(32), preprocess(size=size), settings, device="cpu")
        assert all(np.isfinite([result.history[0].loss, result.history[0].feature_loss]))
        moved = [
            name
            for name, tensor in result.model.state_dict().items()
            if not torch.equal(tensor, student.state_dict()[name])
        ]
        assert len(moved) == len(student.state_dict())  # both heads, both tokens, every stage


# --- borders -----------------------------------------------------------------------------------------------------


def test_no_epochs_returns_the_student(tmp_path: Path) -> None:
    student = tiny_vit(1)
    result = distill(student, tiny_vit(0), source(), preprocess(), DistillSettings(epochs=0), tmp_path / "new")
    assert result.model is student
    assert result.history == ()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        ({"num_classes": 7}, {}, "student has 7 classes, the teacher 4"),
        ({"num_classes": 0}, {}, "nothing to learn from"),
        ({}, {"label_weight": 0.0, "logit_weight": 0.0}, "nothing to learn from"),
    ],
)
def test_what_cannot_be_learned(student: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        distill(tiny_vit(1, **student), tiny_vit(0), source(), preprocess(), replace(SHORT, **settings), device="cpu")
    assert caught.value.fix


def test_labels_of_other_classes_are_refused_or_left_out() -> None:
    data = replace(source(), class_names=("red", "green", "blue", "olive", "pink"))
    with pytest.raises(UserError, match="models have 4 classes, the data 'colours' has 5"):
        train(None, SHORT, data)
    last = train(None, replace(SHORT, epochs=1, label_weight=0.0), data).history[-1]
    assert last.top1 is None
    assert last.agreement is not None


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = tiny_vit(1)
    with torch.no_grad():
        broken.get_parameter("head.bias")[2] = float("inf")
    with pytest.raises(UserError, match=r"teacher's weights .*head\.bias"):
        distill(tiny_vit(0), broken, source(), preprocess(), SHORT, tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_settings_and_folder_that_make_no_sense(tmp_path: Path) -> None:
    for mistake in ({"epochs": -1}, {"lr": 0.0}, {"logit_weight": -1.0}, {"ema_decay": 1.0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="cannot be"):
            DistillSettings(**mistake)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="Cannot write"):
        train(tmp_path / "file", SHORT, source())
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


# --- killed, split, changed --------------------------------------------------------------------------------------


def test_divergence_keeps_the_last_checkpoint_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def overflow(*args: Any) -> tuple[Tensor, Tensor]:
        images, targets = mixed(*args)
        return (images * float("inf") if next(calls) == 4 else images), targets  # epoch 2, step 2 of 3

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "mixed", overflow)
        with pytest.raises(UserError, match=r"diverged.*epoch 2, by step 2") as caught:
            train(tmp_path, SHORT, source())
    assert "lr" in caught.value.fix
    assert len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    continued = train(tmp_path, SHORT, source())
    whole = train(None, SHORT, source())
    assert [entry.epoch for entry in continued.history] == [1, 2, 3]
    assert same_weights(continued.model, whole.model)


def test_finished_training_returns_at_once_and_another_one_is_refused(tmp_path: Path) -> None:
    first = train(tmp_path, SHORT, source())
    data = source()
    again = train(tmp_path, replace(SHORT, workers=1), data)
    assert same_weights(first.model, again.model)
    assert data.train.reads == 0  # type: ignore[attr-defined]
    assert again.history == first.history
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"another training: lr was 0\.008 and is 0\.001, seed was 0 and is 5\."
    ) as caught:
        train(tmp_path, replace(SHORT, lr=1e-3, seed=5), source())
    assert "choose another folder" in caught.value.fix
    with pytest.raises(UserError, match=r"another training: another student\."):
        distill(tiny_vit(3), tiny_vit(0), source(), preprocess(), SHORT, tmp_path, device="cpu")
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept
    other = train(tmp_path / "other", replace(SHORT, lr=1e-3), source())
    assert not same_weights(first.model, other.model)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    assert same_weights(first.model, train(tmp_path, SHORT, source()).model)
    files = ["best.safetensors", "checkpoint.safetensors", "log.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files[:2], "log.jsonl", "other"]


def start(options: dict[str, Any], **environment: str) -> BaseProcess:
    return forked.start(run, {**options, "environment": environment})


def start_two(options: dict[str, Any]) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return [start(options, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]


def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"epochs": 4, "batch_size": 32, "lr": 8e-3, "drop_path": 0.2, "feature_weight": 20.0}
    options = {"settings": settings, "folder": str(folder), "out": str(tmp_path)}
    # In the middle of the second epoch, then with the second epoch's checkpoint written but not yet in place.
    for death in ({"kill_at_image": 96 + 50}, {"kill_in_save": 1}):
        process = start({**options, **death})
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL
        assert len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert (folder / "checkpoint.safetensors.tmp").exists()
    continued = train(folder, DistillSettings(**settings), source())  # type: ignore[arg-type]
    whole = train(None, DistillSettings(**settings), source())  # type: ignore[arg-type]
    assert same_weights(continued.model, whole.model)
    timeless = [[replace(entry, seconds=0, images_per_s=0) for entry in done.history] for done in (continued, whole)]
    assert timeless[0] == timeless[1]
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors", "checkpoint.safetensors", "log.jsonl"]


def test_killed_within_an_epoch_it_sees_the_images_that_were_left(tmp_path: Path) -> None:
    folder, data = tmp_path / "run", source()
    settings = {"epochs": 2, "batch_size": 32, "lr": 8e-3, "drop_path": 0.2, "checkpoint_minutes": 0.0}
    process = start({"settings": settings, "folder": str(folder), "out": str(tmp_path), "kill_at_image": 96 + 70})
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL
    continued = train(folder, DistillSettings(**settings), data)  # type: ignore[arg-type]
    whole = train(None, DistillSettings(**settings), source())  # type: ignore[arg-type]
    assert data.train.reads == 32  # type: ignore[attr-defined]
    assert same_weights(continued.model, whole.model)
    timeless = [[replace(entry, seconds=0, images_per_s=0) for entry in done.history] for done in (continued, whole)]
    assert timeless[0] == timeless[1]


def test_a_signal_lets_it_write_a_checkpoint_and_end(tmp_path: Path) -> None:
    folder, data = tmp_path / "run", source()

    def stop(reads: int) -> None:
        if reads == 96 + 40:  # in the second step of the second epoch
            os.kill(os.getpid(), signal.SIGUSR1)

    data.train.on_read = stop  # type: ignore[attr-defined]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(StoppedError, match="stopped by SIGUSR1 in epoch 2, after step 2; a checkpoint is written"):
        train(folder, SHORT, data)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    left = source()
    continued = train(folder, SHORT, left)
    assert left.train.reads == 32 + 96  # type: ignore[attr-defined]
    assert same_weights(continued.model, train(None, SHORT, source()).model)


def test_one_process_continues_what_two_began(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, data = tmp_path / "run", source()
    settings = {"epochs": 2, "batch_size": 32, "lr": 8e-3, "checkpoint_minutes": 0.0, "cutmix": 0.0, "drop_path": None}
    options = {"settings": settings, "folder": str(folder), "out": str(tmp_path), "kill_at_image": 48 + 20}
    for process in start_two(options):
        process.join(timeout=240)
        assert process.exitcode == -signal.SIGKILL
    with caplog.at_level("INFO", "upvits"):
        continued = train(folder, DistillSettings(**settings), data)  # type: ignore[arg-type]
    assert "1 processes continue what 2 began." in caplog.text
    assert data.train.reads == 64  # type: ignore[attr-defined]
    alone = train(None, DistillSettings(**settings), source())  # type: ignore[arg-type]
    assert [entry.loss for entry in continued.history] == pytest.approx([e.loss for e in alone.history], rel=1e-3)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    # One step an epoch and nothing drawn: then the order of the images is all that differs between one and two.
    settings = {"epochs": 4, "batch_size": 32, "lr": 8e-3, "cutmix": 0.0, "drop_path": None, "feature_weight": 20.0}
    options = {"settings": settings, "source": {"images": 32}, "plain": True, "out": str(tmp_path)}
    options["folder"] = str(tmp_path / "run")
    for process in start_two(options):
        process.join(timeout=180)
        assert process.exitcode == 0
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in "01")
    assert same_weights(first, second)
    assert len((tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    alone = train(None, DistillSettings(**settings), source(32), plain=True)  # type: ignore[arg-type]
    figures = json.loads((tmp_path / "1.json").read_text(encoding="utf-8"))
    assert [loss for loss, _ in figures] == pytest.approx([entry.loss for entry in alone.history], rel=1e-4)
    assert [top1 for _, top1 in figures] == pytest.approx([entry.top1 for entry in alone.history], abs=2)
    for name, tensor in alone.model.state_dict().items():
        compared = torch.arange(len(tensor))
        if name.endswith("attn.qkv.bias"):
            # Softmax ignores what a bias of the keys adds: its gradient is rounding, which Adam scales to a full step.
            queries, keys, values = torch.arange(len(tensor)).chunk(3)
            assert (first[name][keys] - tensor[keys]).abs().max() < 1e-3
            compared = torch.cat([queries, values])
        torch.testing.assert_close(first[name][compared], tensor[compared], rtol=1e-2, atol=1e-4)


def test_batch_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three:
        def __enter__(self) -> Process:
            return Process(0, 3)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(distill_module, "join_processes", Three)
    with pytest.raises(UserError, match="32 images cannot be shared evenly by 3 processes"):
        train(None, SHORT, source())


def test_shares_of_the_data_are_disjoint_and_complete() -> None:
    images = Images(range(100, 122), lambda index: Image.new("RGB", (16, 16)))

    def seen(share: tuple[int, int], epoch: int = 3, skip: int = 0) -> list[list[int]]:
        training = TrainingBatches(images, preprocess(), 6, share=share)
        return [labels.tolist() for _, labels in training.epoch(epoch, skip)]

    def evaluated(share: tuple[int, int]) -> list[list[int]]:
        return [labels.tolist() for _, labels in batches(images, preprocess(), 6, share=share)]

    whole = seen((0, 1))
    parts = [seen((rank, 3)) for rank in range(3)]
    assert [len(step) for step in whole] == [6, 6, 6]
    assert [[*chain(*step)] for step in zip(*parts, strict=True)] == whole  # the global batch is the same
    assert seen((1, 3), skip=2) == parts[1][2:]
    assert seen((0, 1), epoch=4) != whole
    judged = [evaluated((rank, 3)) for rank in range(3)]
    assert [judged[number % 3][number // 3] for number in range(4)] == evaluated((0, 1))
