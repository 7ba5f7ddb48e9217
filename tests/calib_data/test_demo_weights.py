"""The model that ships: loads with stock timm, is small, and is right where its log says so."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config

from upvits.calib_data import Preprocess, batches, demo_weights, open_data
from upvits.calib_data.demo import DEMO_SIZE, demo_images
from upvits.calib_data.drawing import CLASS_NAMES, DRAWING_VERSION


@pytest.fixture(scope="module")
def folder() -> Path:
    path = demo_weights("pvt_v2_b0")
    assert path is not None
    return path


def test_unknown_models_have_no_demo_weights() -> None:
    assert demo_weights("pvt_v2_b5") is None


def test_weights_are_small_and_half_precision(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size < 10_000_000
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}


def test_stock_timm_loads_it_and_it_is_right_on_400_pictures(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_model_data_config(model)
    preprocess = Preprocess(
        tuple(config["input_size"]),
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
        config["crop_pct"],
        config["crop_mode"],
    )
    assert preprocess.input_size == (3, DEMO_SIZE, DEMO_SIZE)
    assert model.pretrained_cfg["label_names"] == list(CLASS_NAMES)
    hits = 0
    with torch.inference_mode():
        for images, labels in batches(demo_images("val", 400), preprocess, 50):
            hits += int((model(images).argmax(1) == labels).sum())
    assert 100 * hits / 400 >= 95


def test_the_log_tells_how_it_was_made(folder: Path) -> None:
    report = json.loads((folder / "train.json").read_text())
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    source = open_data("demo")
    assert report["drawing_version"] == DRAWING_VERSION
    assert report["epochs"] == len(lines)
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert report["top1"] >= 95
    assert report["top1_of"] == len(source.val)
    assert report["linear_baseline_top1"] < 50
    assert abs(report["top1"] - lines[-1]["top1_average"]) < 0.5  # all that rounding to fp16 may cost
