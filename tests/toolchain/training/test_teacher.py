"""Teachers of other kinds, what they say, and what of it is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled

from tests.toolchain.training.tiny_training import damaged, preprocess, source, tiny_vit, train
from upvits.calib_data import Preprocess
from upvits.calib_data.demo import demo_images
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.toolchain.structure.timm_config import update_config
from upvits.toolchain.training import kept_logits
from upvits.toolchain.training.distillation import distill
from upvits.toolchain.training.kept_logits import KeptLogits
from upvits.toolchain.training.objective import Outputs, losses, outputs
from upvits.toolchain.training.preparation import prepare
from upvits.toolchain.training.settings import DistillSettings
from upvits.toolchain.training.teacher import Taught, Teacher, load_teacher, require_same_classes

SHORT = DistillSettings(epochs=1, batch_size=32, lr=8e-3, warmup_epochs=0, drop_path=None)
OTHER = Preprocess((3, 32, 32), (0.2, 0.3, 0.4), (0.3, 0.2, 0.1), "bicubic", 1.0, "center")
CNN = "resnet10t"


def cnn(classes: int = 4) -> torch.nn.Module:
    return timm.create_model(CNN, num_classes=classes).eval()  # type: ignore[no-any-return]


# --- what it sees ------------------------------------------------------------------------------------------------


def test_the_teacher_sees_what_its_own_transform_gives() -> None:
    picture: Image.Image = demo_images("val", 12)[3][0].resize((16, 16))
    given = replace(preprocess(), interpolation="bicubic")
    taught = Taught(torch.nn.Identity(), replace(OTHER, input_size=(3, 16, 16)), given)
    same_size = taught.view(given.eval_transform()(picture)[None])
    torch.testing.assert_close(same_size[0], replace(OTHER, input_size=(3, 16, 16)).eval_transform()(picture))
    larger = Taught(torch.nn.Identity(), OTHER, given).view(given.eval_transform()(picture)[None])
    expected = OTHER.eval_transform()(picture)
    assert larger.shape[1:] == expected.shape
    assert (larger[0] - expected).abs().mean() < 0.05  # rounding to pixels, and what bicubic overshoots


def test_a_convolutional_network_at_another_size_teaches_all_that_can_be_taught() -> None:
    settings = replace(SHORT, feature_weight=1.0, map_weight=1.0, hard_weight=1.0, temperature=2.0)
    teacher = Teacher(cnn(), OTHER)
    run = prepare(tiny_vit(1), teacher, source(), preprocess(), settings, torch.device("cpu"))
    assert run.fit.feature_widths[0] != run.fit.feature_widths[1]
    result = distill(tiny_vit(1), teacher, source(64), preprocess(), settings, device="cpu")
    entry = result.history[-1]
    assert min(entry.label_loss, entry.logit_loss, entry.hard_loss, entry.feature_loss, entry.map_loss) > 0
    weights = dict(zip(("label", "logit", "hard", "feature", "map"), settings.weights, strict=True))
    assert entry.loss == pytest.approx(sum(w * getattr(entry, f"{name}_loss") for name, w in weights.items()), rel=1e-5)


# --- losses ------------------------------------------------------------------------------------------------------


def some(classes: int = 5, seed: int = 0) -> Outputs:
    torch.manual_seed(seed)
    logits = 3 * torch.randn(6, classes)
    return Outputs(logits, logits, torch.randn(6, 7), torch.randn(6, 2, 2, 7))


def test_soft_logits_are_scaled_by_the_temperature() -> None:
    student, teacher = some(seed=1), some(seed=2)
    found = losses(student, teacher, torch.zeros(6, 5), (0, 1.0, 0, 0, 0), temperature=3.0)[1]
    p, q = ((x.logits.double() / 3).softmax(1) for x in (teacher, student))
    assert found.item() == pytest.approx(9 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-5)


def test_hard_labels_are_the_teachers_first_classes() -> None:
    student, teacher = some(seed=1), some(seed=2)
    found = losses(student, teacher, torch.zeros(6, 5), (0, 0, 1.0, 0, 0))[2]
    first = teacher.logits.argmax(1)
    assert found.item() == pytest.approx(-student.logits.log_softmax(1)[range(6), first].mean().item(), rel=1e-6)


def test_maps_are_compared_without_their_scale_and_at_the_students_size() -> None:
    student = some()
    louder = student._replace(maps=4 * student.maps + 1)
    weights = (0, 0, 0, 0, 1.0)
    assert losses(student, louder, torch.zeros(6, 5), weights)[4] < 1e-4
    finer = student._replace(maps=student.maps.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert losses(student, finer, torch.zeros(6, 5), weights)[4] < 0.2  # as far as resizing mixes neighbours
    assert losses(student, some(seed=3), torch.zeros(6, 5), weights)[4] > 1


def distilled(seed: int) -> VisionTransformerDistilled:
    torch.manual_seed(seed)
    return VisionTransformerDistilled(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4)


def test_both_heads_of_a_distilled_network_learn_each_from_its_own_teacher() -> None:
    student = distilled(3)
    images, targets = torch.randn(8, 3, 16, 16), torch.eye(4).repeat(2, 1)
    student.train().set_distilled_training(True)
    found = outputs(student, images)
    with torch.no_grad():
        said = outputs(tiny_vit(0), images)

    def head_gradients(weights: tuple[float, ...]) -> tuple[bool, bool]:
        student.zero_grad()
        parts = losses(outputs(student, images), said, targets, weights) * torch.tensor(weights)
        torch.autograd.backward(parts.sum())
        first, second = (head.weight.grad for head in (student.head, student.head_dist))
        return first is not None and bool(first.any()), second is not None and bool(second.any())

    assert not torch.equal(found.logits, found.taught)
    assert head_gradients((1.0, 0, 0, 0, 0)) == (True, True)  # the network answers with the mean of both
    assert head_gradients((1.0, 1.0, 0, 0, 0)) == (True, True)
    assert head_gradients((0, 1.0, 0, 0, 0)) == (True, True)  # without labels
    result = distill(distilled(3), tiny_vit(0), source(64), preprocess(), SHORT, device="cpu").model
    assert isinstance(result, VisionTransformerDistilled)
    assert not torch.equal(result.head_dist.weight, distilled(3).head_dist.weight)
    maps = result.forward_features(images)
    heads = (result.head(maps[:, 0]) + result.head_dist(maps[:, 1])) / 2
    torch.testing.assert_close(result(images), heads)


# --- kept logits -------------------------------------------------------------------------------------------------


def test_kept_logits_give_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SHORT, epochs=4, teacher_views=2, cutmix=1.0, random_erasing=0.5)
    calls = []
    seen = Taught.forward

    def counted(self: Taught, images: torch.Tensor) -> Outputs:
        calls.append(len(images))
        return seen(self, images)

    monkeypatch.setattr(Taught, "forward", counted)
    kept = train(tmp_path, settings, source(64))
    with_teacher, calls[:] = sum(calls), []
    plain = train(None, settings, source(64))  # without a folder nothing is kept
    assert with_teacher == sum(calls) - 2 * 64
    for one, other in zip(kept.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    assert not list(tmp_path.glob("*.logits"))


def test_rows_that_were_not_written_whole_are_none(tmp_path: Path) -> None:
    store = KeptLogits(tmp_path, "key", views=1, steps=3, images=4, classes=5, share=(0, 1))
    logits = torch.randn(4, 5)
    store.put(0, 1, logits)
    again = KeptLogits(tmp_path, "key", views=1, steps=3, images=4, classes=5, share=(0, 1))
    assert again.get(0, 0) is None
    found = again.get(0, 1)
    assert found is not None
    torch.testing.assert_close(found, logits.half().float())
    (file,) = tmp_path.glob("*.logits")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    assert KeptLogits(tmp_path, "key", 1, 3, 4, 5, (0, 1)).get(0, 1) is None
    assert KeptLogits(tmp_path, "another", 1, 3, 4, 5, (0, 1)).get(0, 1) is None
    kept_logits.clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_are_not_kept() -> None:
    with pytest.raises(UserError, match="only logits are kept"):
        replace(SHORT, teacher_views=3, feature_weight=1.0)


# --- where it comes from -----------------------------------------------------------------------------------------


def test_a_checkpoint_with_its_name(tmp_path: Path) -> None:
    model = cnn(7)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    teacher = load_teacher(f"{CNN}={tmp_path / 'w.pth'}")
    assert teacher.model.num_classes == 7
    assert teacher.preprocess.input_size == (3, 176, 176)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher.model(images), model(images))


def test_a_folder_of_timm(tmp_path: Path) -> None:
    model = cnn(6)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    known = {"mean": [0.1, 0.2, 0.3], "input_size": [3, 96, 96]}
    config = {"architecture": CNN, "num_classes": 6, "pretrained_cfg": known}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    teacher = load_teacher(str(tmp_path))
    assert (teacher.preprocess.mean, teacher.preprocess.input_size) == ((0.1, 0.2, 0.3), (3, 96, 96))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher.model(images), model(images))
    config["model_args"] = {"checkpoint_path": "/etc/passwd"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="was built with arguments: checkpoint_path"):
        load_teacher(str(tmp_path))


def test_what_is_no_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(cnn().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="Which network is") as caught:
        load_teacher(str(tmp_path / "w.safetensors"))
    assert f"resnet50={tmp_path}" in caught.value.fix
    with pytest.raises(UserError, match="holds no weights of this teacher"):
        load_teacher(f"resnet18={tmp_path / 'w.safetensors'}")
    for name in ("resnet5000", "local-dir:/tmp", "hf-hub:someone/model", "resnet18=/nowhere.pth"):
        with pytest.raises(UserError):
            load_teacher(name)

    def offline(*_: object, **__: object) -> object:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(MissingDependencyError, match="cannot be had here") as lacking:
        load_teacher("resnet18")
    assert "resnet18=FILE" in lacking.value.fix


def test_other_classes_are_refused() -> None:
    with pytest.raises(UserError, match="The teacher has 7 classes, the network to prune 4"):
        require_same_classes(cnn(7), 4, None)
    teacher = cnn(2)
    update_config(teacher, label_names=("dog", "cat"))
    require_same_classes(teacher, 2, None)
    require_same_classes(teacher, 2, ("dog", "cat"))
    with pytest.raises(UserError, match="Class 0 of the teacher is 'dog', that of the network to prune 'cat'"):
        require_same_classes(teacher, 2, ("cat", "dog"))


def test_a_training_does_not_go_on_with_another_teacher(tmp_path: Path) -> None:
    data = source(64)
    distill(damaged(tiny_vit(0), 0.1), tiny_vit(0), data, preprocess(), SHORT, tmp_path, device="cpu")
    with pytest.raises(UserError, match="teacher"):
        distill(damaged(tiny_vit(0), 0.1), tiny_vit(5), data, preprocess(), SHORT, tmp_path, device="cpu")
    teacher = Teacher(tiny_vit(0), replace(preprocess(), mean=(0.1, 0.1, 0.1)))
    with pytest.raises(UserError, match="images of the teacher"):
        distill(damaged(tiny_vit(0), 0.1), teacher, data, preprocess(), SHORT, tmp_path, device="cpu")
