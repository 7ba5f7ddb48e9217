"""Names, checkpoints and model folders, good and bad."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.contracts.variants import VARIANTS, make, pictures
from upvits import toolchain
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.toolchain.families import family_of
from upvits.toolchain.networks.catalogue import Architecture, architectures
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.networks.names import asked_weights, candidates, canonical_name
from upvits.toolchain.structure.macs import count_params
from upvits.toolchain.structure.meta import on_meta

DEIT, PVT = VARIANTS[0], VARIANTS[7]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("pvtv2_b0", "pvt_v2_b0"),
        ("PVTv2-B2-li", "pvt_v2_b2_li"),
        ("pvt_v2_b5", "pvt_v2_b5"),
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("deit3_small", "deit3_small_patch16_224"),
        ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("timm/deit_tiny_patch16_224.fb_in1k", "deit_tiny_patch16_224.fb_in1k"),
        ("hf_hub:timm/pvt_v2_b0.in1k", "pvt_v2_b0.in1k"),
    ],
)
def test_common_spellings(name: str, wanted: str) -> None:
    assert canonical_name(name) == wanted


def test_weights_as_the_hub_spells_them() -> None:
    assert asked_weights("deit_tiny", "hf-hub:timm/deit_tiny_patch16_224.fb_in1k") == (
        "deit_tiny_patch16_224.fb_in1k",
        "timm",
    )
    assert asked_weights("deit_tiny", "local-dir:some/folder") == ("deit_tiny_patch16_224", "some/folder")
    with pytest.raises(UserError, match="weights of pvt_v2_b0"):
        asked_weights("deit_tiny", "timm/pvt_v2_b0")
    with pytest.raises(UserError, match="not read from the hub"):
        asked_weights("deit_tiny", "hf_hub:somebody/network")


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(UserError, match="Unknown model") as caught:
        canonical_name("pvtv2_b9")
    assert "pvt_v2_b" in caught.value.fix
    with pytest.raises(UserError, match="not supported"):
        canonical_name("resnet50")


def test_the_catalogue_lists_what_the_families_take() -> None:
    names = [architecture.name for architecture in architectures()]
    assert {name for name in names if "pvt_v2" in name} == {f"pvt_v2_b{i}" for i in range(6)} | {"pvt_v2_b2_li"}
    assert "deit_tiny_patch16_224" in names
    assert "vit_giant_patch14_dinov2" not in names
    (tiny,) = architectures("deit3_small_patch16_224")
    assert (tiny.family, tiny.embed_dim, tiny.depth) == ("vit", 384, 12)


@pytest.mark.slow
def test_the_catalogue_is_what_building_every_model_gives() -> None:
    listed = {architecture.name: architecture for architecture in architectures()}
    assert list(listed) == [name for name in candidates() if takes(name, listed)]


def takes(name: str, catalogue: Mapping[str, Architecture]) -> bool:
    """Whether a family takes the model once it is built, as the catalogue says."""
    with on_meta():
        model = timm.create_model(name)
    try:
        family = family_of(model)
    except UserError:
        return False
    listed = catalogue[name]
    widths = tuple(stage["num_chs"] for stage in model.feature_info)
    sizes = (widths, model.depths) if listed.family == "pvt_v2" else (model.embed_dim, len(model.blocks))
    assert listed.parameters == count_params(model)
    assert (family.__name__.rpartition(".")[2], (listed.embed_dim, listed.depth)) == (listed.family, sizes)
    return True


@pytest.fixture
def deit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("deit_tiny_patch16_224", img_size=48, num_classes=7)
    return model.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_checkpoints_load_with_their_own_classes_and_size(deit: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": deit.state_dict(), "epoch": 3}, path)
    else:
        save_file(deit.state_dict(), path)
    model = toolchain.create_model("deit_tiny", weights=str(path))
    assert model.num_classes == 7
    assert toolchain.preprocess_of(model).input_size == (3, 48, 48)
    image = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        assert torch.equal(model(image), deit(image))


def test_position_embedding_is_resampled_on_request(deit: nn.Module, tmp_path: Path) -> None:
    save_file(deit.state_dict(), tmp_path / "w.safetensors")
    model = toolchain.create_model("deit_tiny", weights=str(tmp_path / "w.safetensors"), image_size=64)
    assert model.pos_embed.shape == (1, 17, 192)
    with torch.inference_mode():
        assert torch.isfinite(model(torch.randn(1, 3, 64, 64))).all()


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    state = dict(state)
    if how == "missing":
        del state["blocks.3.attn.qkv.bias"]
    elif how == "extra":
        state["blocks.99.attn.qkv.bias"] = torch.ones(1)
    elif how == "shape":
        state["norm.weight"] = torch.ones(5)
    elif how == "nan":
        state["norm.weight"] = torch.full((192,), float("nan"))
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing: blocks\.3\.attn\.qkv\.bias"),
        ("extra", r"unknown: blocks\.99"),
        ("shape", r"norm\.weight is \(5,\) instead of \(192,\)"),
        ("nan", r"NaN or infinite values in norm\.weight"),
    ],
)
def test_checkpoints_that_do_not_fit(deit: nn.Module, tmp_path: Path, how: str, message: str) -> None:
    save_file(broken(deit.state_dict(), how), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message):
        toolchain.create_model("deit_tiny", weights=str(tmp_path / "w.safetensors"))


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_pickles_with_code_are_not_opened(deit: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": deit.state_dict(), "extra": Bomb(tmp_path / "exploded")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="more than tensors"):
        toolchain.create_model("deit_tiny", weights=str(tmp_path / "w.pth"))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError):
        toolchain.create_model("deit_tiny", weights=str(tmp_path / "plain.pth"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_and_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no checkpoint file"):
        toolchain.create_model("deit_tiny", weights=str(tmp_path / name))
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError):
        toolchain.create_model("deit_tiny", weights=str(tmp_path / name))


def test_no_demo_weights_and_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no demo weights"):
        toolchain.create_model("deit_tiny", weights="demo")
    with pytest.raises(MissingDependencyError, match="cannot be had") as caught:
        toolchain.create_model("deit_tiny", weights="timm")
    assert caught.value.exit_code == 3
    assert '`weights="FILE"`' in caught.value.fix


def test_nothing_is_overwritten_and_nothing_half_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(DEIT)
    toolchain.save(model, tmp_path / "model")
    with pytest.raises(UserError, match="exists already"):
        toolchain.save(model, tmp_path / "model")
    monkeypatch.setattr(
        "upvits.toolchain.networks.models.save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space"):
        toolchain.save(model, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_models_with_unrecorded_arguments_are_not_saved_wrong(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5, act_layer="relu")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(50)
        model.head.weight.mul_(50)
    toolchain.save(model, tmp_path / "model")
    model.blocks[0].mlp.act = nn.Hardswish()
    with pytest.raises(UserError, match="does not compute"):
        toolchain.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_labels_and_preprocessing_travel_along(tmp_path: Path) -> None:
    model: Any = make(DEIT)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": tuple("abcde"), "mean": (0.1, 0.2, 0.3)}
    toolchain.save(model, tmp_path / "model")
    loaded = toolchain.load(tmp_path / "model")
    assert label_names_of(loaded) == tuple("abcde")
    assert toolchain.preprocess_of(loaded) == toolchain.preprocess_of(model)
    assert toolchain.preprocess_of(loaded).mean == (0.1, 0.2, 0.3)


def test_half_precision_files_load_as_fp32(tmp_path: Path) -> None:
    model = make(PVT)
    toolchain.save(model, tmp_path / "model")
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "model" / "model.safetensors")
    loaded = toolchain.load(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.isfinite(loaded(pictures(PVT))).all()


@pytest.mark.parametrize("content", [None, "", "{}", json.dumps({"architecture": "pvt_v2_b0"})])
def test_folders_that_are_no_models(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        toolchain.load(tmp_path)


def test_another_architecture_in_the_folder(tmp_path: Path) -> None:
    toolchain.save(make(PVT), tmp_path / "model")
    with pytest.raises(UserError, match="holds a pvt_v2_b0"):
        toolchain.create_model("deit_tiny", weights=str(tmp_path / "model"))
