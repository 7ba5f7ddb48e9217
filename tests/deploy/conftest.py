"""Small real timm models and their exports, made once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from filelock import FileLock
from torch import nn

from upvits import toolchain
from upvits.calib_data import Preprocess
from upvits.deploy.graphs.export import ExportReport, export_onnx


@dataclass(frozen=True, slots=True)
class Exported:
    """A model, what was exported from it, and images that it takes."""

    model: nn.Module
    report: ExportReport
    images: torch.Tensor
    preprocess: Preprocess


def preprocess_for(size: int) -> Preprocess:
    return Preprocess((3, size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, "center")


def small_model(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """A timm model with no parameter left at 0 or 1: simplifiers drop what does nothing."""
    generator = torch.Generator().manual_seed(seed)
    model: nn.Module = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5)
    return model.eval()


def export_small(folder: Path, model: nn.Module, size: int) -> Exported:
    preprocess = preprocess_for(size)
    report = export_onnx(model, folder / "model.onnx", preprocess, metadata={"labels": '["cat", "dog"]'})
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Exported(model, report, images, preprocess)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = small_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=7)
    return export_small(tmp_path_factory.mktemp("vit"), model, 32)


@pytest.fixture(scope="session")
def pvt(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    widths: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)}
    return export_small(tmp_path_factory.mktemp("pvt"), small_model("pvt_v2_b0", num_classes=7, **widths), 64)


@pytest.fixture(scope="session")
def demo_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's PVTv2-B0 as ONNX, exported once for all workers of pytest-xdist: read it, or copy it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo_graph"
    path = folder / "model.onnx"
    with FileLock(f"{folder}.lock"):
        if not path.exists():
            folder.mkdir(exist_ok=True)
            model = toolchain.create_model("pvt_v2_b0", weights="demo")
            export_onnx(model, path, toolchain.preprocess_of(model))
            path.chmod(0o444)
    return path
