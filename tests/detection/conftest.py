"""Small backbones and drawn scenes; mmdet is optional, and tests that need it say so."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner, Result

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.calib_data.writing import write_coco
from upvits.deploy.cli.app import app
from upvits.deploy.cli.arguments import as_options, options_of
from upvits.detection import configs, openmm
from upvits.detection.backbone import UPPVTv2
from upvits.detection.coco import CocoData, open_coco

Document = dict[str, Any]

SMALL = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "num_classes": 5}


@pytest.fixture(scope="session")
def mmdet() -> None:
    """Skips where the optional packages are absent."""
    gone = openmm.missing()
    if gone is not None:
        assert "DETECTION" not in os.environ, gone.what  # `make test-detection` sets it
        pytest.skip(gone.what)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of a few drawn pictures."""
    folder = tmp_path_factory.mktemp("scenes")
    write_coco(folder, "train", 12, 64)
    write_coco(folder, "val", 4, 64)
    return folder


@pytest.fixture(scope="session")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    return open_coco(scenes, tmp_path_factory.mktemp("cache"))


def small_pvt(seed: int = 0) -> nn.Module:
    """A small PVTv2 whose parameters all matter."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model("pvt_v2_b0", **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: dense, cut uniformly, and cut by a global plan."""
    place, model = tmp_path_factory.mktemp("models"), small_pvt()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = toolchain.score(model, images)
    plans = {
        "uniform": toolchain.plan(model, scores, ratio=0.5, align=4),
        "global": toolchain.plan(model, scores, target_macs=0.6, planner="global", align=4),
    }
    networks = {"dense": model, **{name: toolchain.delete_units(model, plan) for name, plan in plans.items()}}
    for name, network in networks.items():
        toolchain.save(network, place / name)
    return {name: place / name for name in networks}


def small_config(folder: Path, classes: int) -> configs.Config:
    """A narrow RetinaNet on the network in a folder."""
    backbone = {"type": "UPPVTv2", "model": str(folder)}
    return configs.retinanet(backbone, UPPVTv2(folder).channels, classes, fpn_channels=16, stacked_convs=1)


def small_retinanet(folder: Path, classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A detector that finds something: its head's last layer is random and not modest."""
    model = small_config(folder, classes)
    torch.manual_seed(0)
    detector = openmm.build_detector(model)
    with torch.no_grad():
        for name in ("retina_cls", "retina_reg"):
            detector.get_parameter(f"bbox_head.{name}.weight").normal_(0, 0.3)
        detector.get_parameter("bbox_head.retina_cls.bias").fill_(-2)
    return detector, model


def changed(scenes: Path, place: Path, change: Callable[[Document], object], split: str = "train") -> Path:
    """A copy of the scenes with other annotations."""
    shutil.copytree(scenes, place)
    path = place / split / "annotations.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return place


def detect(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["detect", *map(str, arguments)], catch_exceptions=False)


@contextmanager
def refused(text: str, exit_code: int = 2) -> Iterator[None]:
    """The command line says this text, and what to do."""
    with pytest.raises(UserError) as caught:
        yield
    assert text in as_options(str(caught.value), options_of(app))
    assert caught.value.exit_code == exit_code
    assert caught.value.fix
