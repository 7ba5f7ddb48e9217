"""What a weight file does not say about a ViT: pooling, activation and shape, decided by accuracy or asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.document import make_recipe
from upvits.deploy.recipe.request import Job, resolve
from upvits.deploy.stages.dense import judge_dense
from upvits.toolchain.networks.found import how_read
from upvits.toolchain.networks.models import preprocess_of

NAME = "deit_tiny_patch16_224"
ARGS: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 2, "patch_size": 8}
CLASSES = 4


def pictures(root: Path, height: int, width: int) -> Path:
    """Pictures with a bright spot in one of four parts from left to right, which is their class."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 32)):
        for label in range(CLASSES):
            folder = root / split / "abcd"[label]
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 60, (height, width, 3), dtype=np.uint8)
                row, column = numbers.integers(0, height - 8), label * width // 4 + numbers.integers(0, width // 8)
                pixels[row : row + 8, column : column + 8] += 180
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def trained(data: Path, size: tuple[int, int], **args: Any) -> nn.Module:
    """A network that is right on these pictures."""
    torch.manual_seed(0)
    model: Any = timm.create_model(NAME, num_classes=CLASSES, img_size=size, **ARGS, **args)
    files = sorted((data / "val").glob("*/*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files])
    images = (images - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) / torch.tensor((0.229, 0.224, 0.225)).view(
        3, 1, 1
    )
    labels = torch.tensor(["abcd".index(file.parent.name) for file in files])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if loss < 0.02:
            break
    return model.eval()  # type: ignore[no-any-return]


def resolved(data: Path, weights: Path, out: Path, **more: Any) -> Job:
    values = {
        "model": NAME, "weights": str(weights), "data": f"imagefolder:{data}", "plan": {"ratio": 0.5}, "crop_pct": 1.0,
        "model_args": ARGS, **more,
    }  # fmt: skip
    return resolve(make_recipe(values), out)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("square"), 32, 32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("wide"), 16, 64)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_accuracy_decides_how_features_are_pooled(square: Path, tmp_path: Path, pool: str) -> None:
    model = trained(square, (32, 32), global_pool=pool, fc_norm=False)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    job = resolved(square, tmp_path / "w.pth", tmp_path / "run")
    assert job.recipe.model_args["global_pool"] == pool
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(job.dense(image), model(image), atol=1e-5)
    pooling, activation = job.notes
    assert f"how features are pooled. global_pool={pool} is taken" in pooling
    assert "of 128 validation images" in pooling
    assert ("because" in pooling) == (pool == "avg")
    assert "which activation the network has. act_layer=gelu is taken" in activation
    assert not any("Assumed" in note for note in how_read(job.dense))
    again = resolved(square, tmp_path / "w.pth", tmp_path / "run", model_args=job.recipe.model_args)
    assert again.notes == ()
    assert again.recipe == job.recipe


def test_without_labels_it_is_assumed_and_said(square: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for index, file in enumerate(sorted(square.rglob("*.png"))[:40]):
        (loose / f"{index}.png").write_bytes(file.read_bytes())
    torch.save(timm.create_model(NAME, num_classes=CLASSES, img_size=32, **ARGS).state_dict(), tmp_path / "w.pth")
    job = resolved(loose, tmp_path / "w.pth", tmp_path / "run")
    (note,) = [note for note in how_read(job.dense) if "Assumed" in note]
    assert "global_pool=token and act_layer=gelu" in note
    assert job.notes == ()


def test_a_wide_network_is_not_taken_for_a_square(wide: Path, square: Path, tmp_path: Path) -> None:
    """2 x 8 patches are 4 x 4, too."""
    model = trained(wide, (16, 64))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    settled = {**ARGS, "global_pool": "token", "act_layer": "gelu"}
    job = resolved(wide, tmp_path / "w.pth", tmp_path / "run", model_args=settled)
    assert job.recipe.image_size == (16, 64)
    assert job.preprocess.input_size == preprocess_of(job.dense).input_size == (3, 16, 64)
    (note,) = job.notes
    assert "fits images of 32 x 32 pixels and of 16 x 64 pixels. 16 x 64 pixels is taken, because" in note
    judge_dense(job)
    torch.save(trained(square, (32, 32)).state_dict(), tmp_path / "square.pth")
    job = resolved(square, tmp_path / "square.pth", tmp_path / "other", model_args=settled)
    assert (job.notes, job.recipe.image_size) == ((), None)  # square pictures: nobody is bothered


def test_sizes_that_fit_are_named_where_the_square_is_near_chance(wide: Path, square: Path, tmp_path: Path) -> None:
    torch.save(trained(wide, (16, 64)).state_dict(), tmp_path / "w.pth")
    settled = {**ARGS, "global_pool": "token", "act_layer": "gelu"}
    squeezed = tmp_path / "set"
    for file in wide.rglob("*.png"):
        target = squeezed / file.relative_to(wide)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).rotate(90, expand=True).resize((32, 32)).save(target)
    job = resolved(squeezed, tmp_path / "w.pth", tmp_path / "run", model_args=settled)
    with pytest.raises(UserError) as caught:
        judge_dense(job)
    assert "the image size (the position embedding is taken for 32 x 32 pixels and fits 16 x 64, 64 x 16, too" in (
        caught.value.why
    )
