"""`--train-recipe`: names, files, and what wins over what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.document import DistillRecipe, make_recipe
from upvits.deploy.recipe.request import distill_settings, resolve
from upvits.deploy.recipe.train_recipe import train_values
from upvits.toolchain.training.recipes import RECIPES
from upvits.toolchain.training.settings import DistillSettings

BASE: dict[str, Any] = {"model": "pvtv2_b0", "plan": {"ratio": 0.5}, "device": "cpu"}


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_valid_settings(name: str) -> None:
    values = train_values(name, 1_281_167)
    DistillSettings(**values)
    assert set(values) <= set(DistillRecipe.model_fields)


def test_up_has_the_constants_of_the_paper() -> None:
    settings = DistillSettings(**train_values("up", 1_281_167))
    assert (settings.epochs, settings.batch_size, settings.lr, settings.weight_decay) == (200, 256, 1e-3, 1e-3)
    assert (settings.warmup_epochs, settings.drop_path, settings.cutmix) == (2, 0.1, 0.5)
    assert settings.weights == (1.0, 6.4, 0.0, 0.0, 0.0)


def test_the_command_line_wins_over_the_recipe_which_wins_over_what_suits_the_data(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "up"\nlr = 5e-4\nrandom_erasing = 0.1\n', encoding="utf-8")
    distill = {"train_recipe": str(file), "epochs": 7}
    job = resolve(make_recipe({**BASE, "distill": distill}), tmp_path / "run")
    settings = distill_settings(job.recipe)
    assert (settings.epochs, settings.lr, settings.random_erasing, settings.min_crop) == (7, 5e-4, 0.1, 0.08)
    assert settings.feature_weight == 20.0  # of the family, which the recipe does not name
    file.unlink()
    again = resolve(job.recipe, tmp_path / "run")  # a run that goes on needs the file no more
    assert distill_settings(again.recipe) == settings


def test_without_a_recipe_settings_are_those_of_short(tmp_path: Path) -> None:
    plain, short = (
        resolve(make_recipe({**BASE, "distill": distill}), tmp_path) for distill in ({}, {"train_recipe": "short"})
    )
    assert distill_settings(plain.recipe) == distill_settings(short.recipe)


def test_batches_of_named_recipes_are_no_larger_than_the_data() -> None:
    assert train_values("modern", 300)["batch_size"] == 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate = 1e-3", "learning_rate is no setting of a recipe of training"),
        ("mixupp = 0.8", "Did you mean mixup?"),
        ('base = "moderm"', "is no recipe"),
        ('finetuned = "weights.pth"', "finetuned is no setting"),
        ('optimizer = "evil.module:run"', "optimizer"),
        ('base = ["up"]', "is no recipe"),
        ("layer_decay = 1.5", "layer_decay"),
        ("epochs = true", "no truth value"),
        ("epochs =", "cannot read the recipe"),
    ],
)
def test_files_that_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        train_values(str(file), 1_000)
    assert said in str(caught.value)


def test_a_name_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean modern") as caught:
        train_values("modren", 1_000)
    assert "up, modern, short" in caught.value.fix


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"label_smoothing": 0.1, "label_weight": 0.0}, "label_smoothing without label_weight"),
        ({"label_weight": 0.0, "logit_weight": 0.0, "feature_weight": 0.0}, "nothing to learn from"),
        ({"batch_size": 30, "accumulation": 4}, "no multiple of accumulation"),
        ({"auto_augment": "rand-m9", "color_jitter": 0.3}, "color_jitter has no effect"),
        ({"auto_augment": "rand-x9"}, "is no policy of timm"),
        ({"auto_augment": "randaugment"}, "is no policy of timm"),
        ({"auto_augment": "rand-m9.5"}, "is no policy of timm"),
        ({"auto_augment": "rand-n1.5"}, "is no policy of timm"),
        ({"auto_augment": "augmix-w1.5"}, "is no policy of timm"),
        ({"auto_augment": "augmix-w100-d100"}, "is no policy of timm"),
        ({"auto_augment": "augmix-a0"}, "is no policy of timm"),
        ({"auto_augment": "/etc/passwd"}, "is no policy of timm"),
        ({"amp": "fp16"}, "amp fp16 needs a GPU"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    distill: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(make_recipe({**BASE, "distill": distill}), tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"epochs": 0}, "--epochs 0 trains nothing"),
        ({"finetuned": "weights.safetensors"}, "--finetuned brings trained weights"),
        ({}, "The teacher has 5 classes, the network to prune 12"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(distill: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "weights.safetensors").touch()
    if "finetuned" in distill:
        distill = {"finetuned": str(tmp_path / "weights.safetensors")}
        save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    asked = {**distill, "teacher": f"resnet10t={tmp_path / 'w.safetensors'}"}
    with pytest.raises(UserError) as caught:
        resolve(make_recipe({**BASE, "distill": asked}), tmp_path / "run")
    assert said in str(caught.value)
