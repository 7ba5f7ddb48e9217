"""Folders with numbers as names, and networks that are hardly better than guessing: said before anything expensive."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from upvits.calib_data import demo_weights, open_data
from upvits.calib_data.errors import UserError
from upvits.deploy.pipeline import run_stages
from upvits.deploy.recipe.document import make_recipe
from upvits.deploy.recipe.request import resolve
from upvits.deploy.stages.dense import accuracy_of_dense, judge_dense
from upvits.deploy.store.run_dir import open_run

NAMES = sorted(str(number) for number in range(1, 13))
"""Names of the demo's classes as somebody has them who trained with torchvision."""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 60 training and 120 validation pictures of the demo, in folders named 1 to 12."""
    root, demo = tmp_path_factory.mktemp("numbers"), open_data("demo")
    for split, images, count in (("train", demo.train, 60), ("val", demo.val, 120)):
        for index in range(count):
            image, label = images[index]
            folder = root / split / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network without the names of its classes."""
    return weights(tmp_path_factory.mktemp("weights") / "model", None)


def weights(folder: Path, names: list[str] | None, **preprocess: Any) -> Path:
    source = demo_weights("pvt_v2_b0")
    assert source is not None
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("label_names", None)
    config["pretrained_cfg"].pop("label_names")
    config["pretrained_cfg"] |= preprocess
    if names is not None:
        config["label_names"] = names
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def values(model: Path | str, data: Path, **more: Any) -> dict[str, Any]:
    plan = {"ratio": 0.5}
    return {"model": "pvtv2_b0", "weights": str(model), "data": f"imagefolder:{data}", "plan": plan, **more}


def test_accuracy_finds_the_order_of_numbered_folders(numbers: Path, nameless: Path, tmp_path: Path) -> None:
    job = resolve(make_recipe(values(nameless, numbers)), tmp_path / "run")
    assert job.recipe.class_order == "text"
    assert job.source.class_names == tuple(NAMES)
    (note,) = job.notes
    assert re.search(r"text order \(1, 10, 11, 12, \.\.\.; as torchvision does\).* 9\d\.\d % of 120 .* natural", note)
    judged = judge_dense(job)
    top1 = accuracy_of_dense(judged).top1
    assert top1 is not None
    assert top1 > 95
    again = resolve(make_recipe(values(nameless, numbers, class_order="text")), tmp_path / "run")
    assert again.notes == ()
    assert again.inputs == job.inputs


def test_names_in_the_weights_decide(numbers: Path, tmp_path: Path) -> None:
    job = resolve(make_recipe(values(weights(tmp_path / "named", NAMES), numbers)))
    assert job.source.class_names == tuple(NAMES)
    assert (job.recipe.class_order, job.notes) == (None, ())
    placeholders = [f"LABEL_{number}" for number in range(12)]
    assert resolve(make_recipe(values(weights(tmp_path / "no", placeholders), numbers))).recipe.class_order == "text"
    with pytest.raises(UserError, match="classes of weights and data differ") as caught:
        resolve(make_recipe(values(weights(tmp_path / "other", [f"x{n}" for n in range(12)]), numbers)))
    assert "--class-map" in caught.value.fix


def test_two_orders_that_fit_alike_are_asked_for(numbers: Path, nameless: Path, tmp_path: Path) -> None:
    data = tmp_path / "set"
    shutil.copytree(numbers, data)
    for split in ("train", "val"):  # half of what differs is right in either order
        for first, second in (("10", "2"), ("11", "3"), ("12", "4"), ("5", "9")):
            middle = data / split / "middle"
            (data / split / first).rename(middle)
            (data / split / second).rename(data / split / first)
            middle.rename(data / split / second)
    with pytest.raises(UserError, match=r"numbered in two ways") as caught:
        resolve(make_recipe(values(nameless, data)))
    assert "natural order (1, 2, 3, 4, ...; as timm does)" in caught.value.why
    assert "text order (1, 10, 11, 12, ...; as torchvision does)" in caught.value.why
    assert "--class-order" in caught.value.fix
    with pytest.raises(UserError, match="numbered in two ways"):
        resolve(make_recipe(values(nameless, data, allow_weak=True)))


def test_random_weights_ask_nothing(numbers: Path, tmp_path: Path) -> None:
    job = resolve(make_recipe(values("random", numbers, image_size=32)), tmp_path / "run")
    assert (job.recipe.class_order, job.notes) == (None, ())
    judge_dense(job)


def test_a_class_map_settles_it(numbers: Path, nameless: Path, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("\n".join(NAMES))
    job = resolve(make_recipe(values(nameless, numbers, class_map=str(tmp_path / "map.txt"))))
    assert (job.source.class_names, job.notes) == (tuple(NAMES), ())
    (tmp_path / "map.json").write_text(json.dumps({name: number + 3 for number, name in enumerate(NAMES)}))
    with pytest.raises(UserError, match="know 12 classes, the data have 15"):
        resolve(make_recipe(values(nameless, numbers, class_map=str(tmp_path / "map.json"))))


def test_the_wrong_order_of_classes_ends_the_run(numbers: Path, nameless: Path, tmp_path: Path) -> None:
    job = resolve(make_recipe(values(nameless, numbers, class_order="natural")), tmp_path / "run")
    with (
        open_run(job.folder, job.recipe.model_dump(), ()),
        pytest.raises(UserError, match=r"8\.3 % of 120 .* guessing gives 8\.3 %") as caught,
    ):
        run_stages(job, "score")
    assert re.search(r"1\. the order of classes \(with other numbers 9\d\.\d % are right", caught.value.why)
    assert "--allow-weak" in caught.value.fix
    assert not (job.folder / "1-score").exists()


def test_the_wrong_normalisation_comes_first_where_it_helps(numbers: Path, tmp_path: Path) -> None:
    broken = weights(tmp_path / "weights", NAMES, mean=[60.0, 60.0, 60.0], std=[90.0, 90.0, 90.0])
    job = resolve(make_recipe(values(broken, numbers)), tmp_path / "run")
    with pytest.raises(UserError) as caught:
        judge_dense(job)
    assert re.search(r"1\. the normalisation \(at best, with .*, (9\d|100)\.\d % of 64", caught.value.why)
    job = resolve(make_recipe(values(broken, numbers, allow_weak=True)), tmp_path / "run")
    assert judge_dense(job).skipped


def test_few_images_or_no_labels_end_no_run(numbers: Path, nameless: Path, tmp_path: Path) -> None:
    for index, file in enumerate(sorted(numbers.rglob("*.png"))[:40]):
        (tmp_path / "loose").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "loose" / f"{index}.png")
    judge_dense(resolve(make_recipe(values(nameless, tmp_path / "loose")), tmp_path / "a"))
    for name in NAMES:
        for split in ("train", "val"):
            (tmp_path / "few" / split / name).mkdir(parents=True)
            shutil.copy(next((numbers / split / name).iterdir()), tmp_path / "few" / split / name / "x.png")
    judge_dense(resolve(make_recipe(values(nameless, tmp_path / "few", class_order="natural")), tmp_path / "b"))


def test_far_below_what_the_checkpoint_recorded_ends_the_run(numbers: Path, tmp_path: Path) -> None:
    source = demo_weights("pvt_v2_b0")
    assert source is not None
    state = load_file(source / "model.safetensors")
    torch.save({"state_dict": state, "metric": 98.75}, tmp_path / "model_best.pth.tar")
    swapped = [*NAMES[2:4], *NAMES[:2], *NAMES[4:]]  # four of twelve classes
    for name, order in (("right", NAMES), ("wrong", swapped)):
        (tmp_path / f"{name}.txt").write_text("\n".join(order))
        more = {"class_map": str(tmp_path / f"{name}.txt"), "image_size": 64}
        job = resolve(make_recipe(values(tmp_path / "model_best.pth.tar", numbers, **more)), tmp_path / name)
        half = replace(job.preprocess, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
        job = replace(job, preprocess=half)
        if name == "right":
            judge_dense(job)
            continue
        with pytest.raises(UserError, match=r"6\d\.\d % of 120 .* its checkpoint recorded 98\.8 %") as caught:
            judge_dense(job)
        assert "1. the order of classes (with other numbers 9" in caught.value.why
