"""Image size, normalisation, pooling and activation: by evidence, with its source, and never guessed in silence."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import CheckpointSaver

from tests.toolchain.networks.tiny import ARGS, PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.found import found_in, how_read


def trained(folder: Path, name: str, model: Any, **args: Any) -> Path:
    """What timm's training script leaves."""
    folder.mkdir()
    given = {
        "model": name,
        "img_size": None,
        "mean": None,
        "std": None,
        "crop_pct": None,
        "interpolation": "",
        "gp": None,
    }
    namespace = argparse.Namespace(**{**given, "input_size": None, "eval_metric": "top1", "model_kwargs": {}, **args})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CheckpointSaver(model, optimizer, args=namespace, checkpoint_dir=str(folder)).save_checkpoint(3, metric=91.25)
    return folder / "last.pth.tar"


def read(path: Path, name: str, **options: Any) -> Any:
    return toolchain.create_model(name, weights=str(path), **{"model_args": ARGS[name], **options})


@pytest.mark.parametrize("name", [VIT, PVT])
def test_arguments_of_timms_training(tmp_path: Path, name: str) -> None:
    args = {
        "img_size": 64,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
    }
    model = built(name, size=64)
    network = read(trained(tmp_path / "run", name, model, **args), name)
    preprocess = toolchain.preprocess_of(network)
    assert (preprocess.input_size, preprocess.mean, preprocess.std) == ((3, 64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (preprocess.crop_pct, preprocess.interpolation) == (0.8, "bilinear")
    assert {found_in(network).sources[key] for key in ("input_size", "mean", "crop_pct")} == {
        "the checkpoint's arguments"
    }
    assert found_in(network).accuracy == 91.25
    assert "mean" in how_read(network)[-1]
    assert torch.equal(outputs(network, 64), outputs(model, 64))
    given = read(tmp_path / "run" / "last.pth.tar", name, preprocess={"mean": (0.5,), "interpolation": "bicubic"})
    assert toolchain.preprocess_of(given).mean == (0.5, 0.5, 0.5)
    assert found_in(given).sources["mean"] == "the options"
    assert found_in(given).sources["std"] == "the checkpoint's arguments"


def test_pvt_without_a_size_is_asked_for(tmp_path: Path) -> None:
    torch.save(built(PVT).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="Which image size") as caught:
        read(tmp_path / "w.pth", PVT)
    assert "`image_size=224`" in caught.value.fix
    assert toolchain.preprocess_of(read(tmp_path / "w.pth", PVT, image_size=64)).input_size == (3, 64, 64)
    known = toolchain.create_model("pvt_v2_b0.in1k", weights=str(tmp_path / "w.pth"), model_args=ARGS[PVT])
    assert toolchain.preprocess_of(known).input_size == (3, 224, 224)
    args = trained(tmp_path / "run", PVT, built(PVT))
    assert found_in(read(args, PVT)).sources["input_size"] == (
        "timm's configuration of pvt_v2_b0, as its arguments say"
    )


def test_average_pooling_without_a_norm_of_its_own(tmp_path: Path) -> None:
    model = built(VIT, global_pool="avg", fc_norm=False)
    for path, options in (
        (trained(tmp_path / "run", VIT, model, gp="avg"), {}),
        (trained(tmp_path / "bare", VIT, model), {"model_args": {**ARGS[VIT], "global_pool": "avg"}}),
    ):
        network = read(path, VIT, **options)
        assert torch.allclose(outputs(network), outputs(model), rtol=1e-5, atol=1e-5)
        assert any("global_pool=avg" in note for note in found_in(network).notes)
        toolchain.save(network, path.parent / "saved")
        assert torch.equal(outputs(toolchain.load(path.parent / "saved")), outputs(network))


def test_pooling_that_nothing_tells_is_said_to_be_assumed(tmp_path: Path) -> None:
    torch.save(built(VIT, global_pool="avg", fc_norm=False).state_dict(), tmp_path / "w.pth")
    assumed = "The file does not say how features are pooled and which activation the network has"
    assert any(assumed in note for note in how_read(read(tmp_path / "w.pth", VIT)))
    settled = read(tmp_path / "w.pth", VIT, model_args={**ARGS[VIT], "global_pool": "avg"})
    (note,) = [note for note in how_read(settled) if "does not say" in note]
    assert "which activation the network has. Assumed is what timm takes for this name: act_layer=gelu" in note
    both = {**ARGS[VIT], "global_pool": "avg", "act_layer": "gelu"}
    assert not any("does not say" in note for note in how_read(read(tmp_path / "w.pth", VIT, model_args=both)))
    clip = built("vit_base_patch32_clip_quickgelu_224", size=64)
    torch.save(clip.state_dict(), tmp_path / "clip.pth")
    named = toolchain.create_model(
        "vit_base_patch32_clip_quickgelu_224", weights=str(tmp_path / "clip.pth"), model_args=ARGS[VIT]
    )
    assert found_in(named).untold == {"global_pool": ("token", "avg"), "act_layer": ("quick_gelu", "gelu")}
    assert torch.equal(outputs(named, 64), outputs(clip, 64))
    told = read(trained(tmp_path / "run", VIT, built(VIT)), VIT)
    assert not any(assumed in note for note in how_read(told))
    torch.save(built(PVT).state_dict(), tmp_path / "pvt.pth")
    assert found_in(read(tmp_path / "pvt.pth", PVT, image_size=SIZE)).untold == {}


def test_average_pooling_with_its_norm_and_other_activations(tmp_path: Path) -> None:
    torch.save(built(VIT, global_pool="avg").state_dict(), tmp_path / "avg.pth")
    pooled = read(tmp_path / "avg.pth", VIT)
    assert torch.allclose(outputs(pooled), outputs(built(VIT, global_pool="avg")), rtol=1e-5, atol=1e-5)
    quick = built(VIT, act_layer="quick_gelu")
    path = trained(tmp_path / "run", VIT, quick, model_kwargs={"act_layer": "quick_gelu"})
    network = read(path, VIT)
    assert torch.allclose(outputs(network), outputs(quick), rtol=1e-5, atol=1e-5)
    toolchain.save(network, tmp_path / "saved")
    assert torch.allclose(outputs(toolchain.load(tmp_path / "saved")), outputs(quick), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preprocess": {"mean": (0.5, 0.5)}}, "2 numbers, but the network reads 3 channels"),
        ({"preprocess": {"gamma": 1}}, "no entry 'gamma'"),
        ({"preprocess": {"interpolation": "cubic"}}, "preprocessing is not valid"),
        ({"model_args": {"pretrained": True}}, "is not valid"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "is not valid"),
        ({"model_args": {"depth": 2.5}}, "is not valid"),
    ],
)
def test_requests_that_cannot_be_meant(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    torch.save(built(VIT).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        read(tmp_path / "w.pth", VIT, **options)


def test_what_is_said_is_not_trusted(tmp_path: Path) -> None:
    path = trained(
        tmp_path / "run", VIT, built(VIT), mean="everything", img_size=10**9, crop_pct=-3, model_kwargs={"x": 1}
    )
    network = read(path, VIT)
    assert toolchain.preprocess_of(network).input_size == (3, SIZE, SIZE)
    assert toolchain.preprocess_of(network).mean == (0.485, 0.456, 0.406)
