"""Folders of transformers load with the outputs that transformers itself gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toolchain.networks.tiny import SIZE
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.found import found_in
from upvits.toolchain.networks.models import label_names_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 72, "image_size": SIZE,
    "patch_size": 16, "num_labels": 5, "id2label": dict(enumerate("abcde")), "label2id": {},
}  # fmt: skip
PVT: dict[str, Any] = {
    "image_size": 64, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "depths": [1, 1, 1, 1],
    "num_labels": 5,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("ViTConfig", SIZES),
    "ViTModel": ("ViTConfig", {**SIZES, "hidden_act": "gelu_new", "qkv_bias": False}),
    "DeiTForImageClassification": ("DeiTConfig", SIZES),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", SIZES),
    "Dinov2Model": ("Dinov2Config", SIZES),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", SIZES),
    "PvtV2ForImageClassification": ("PvtV2Config", PVT),
    "PvtV2Model": ("PvtV2Config", {**PVT, "linear_attention": True}),
}


def made(kind: str) -> Any:
    """A network of transformers in which every tensor matters."""
    config, sizes = KINDS[kind]
    torch.manual_seed(0)
    network = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def theirs(network: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = network(image)
    if hasattr(output, "logits"):
        return output.logits  # type: ignore[no-any-return]
    state: torch.Tensor = output.last_hidden_state
    return state[:, 0] if state.ndim == 3 else state.mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_transformers(tmp_path: Path, kind: str, sharded: bool) -> None:
    network = made(kind)
    network.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    read = toolchain.load(tmp_path)
    side = toolchain.preprocess_of(read).input_size[1]
    assert side == (64 if kind.startswith("Pvt") else SIZE)
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = read(image)
    assert torch.allclose(ours, theirs(network, image), rtol=1e-5, atol=1e-5)
    if kind.startswith(("ViTFor", "DeiT")):
        assert label_names_of(read) == tuple("abcde")


@pytest.mark.filterwarnings("ignore")
def test_the_image_processor_says_how_images_are_prepared(tmp_path: Path) -> None:
    made("ViTForImageClassification").save_pretrained(tmp_path)
    document = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**document, "size": {"height": 32, "width": 32}}))
    read = toolchain.load(tmp_path)
    preprocess = toolchain.preprocess_of(read)
    assert (preprocess.mean, preprocess.std, preprocess.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert (preprocess.crop_pct, preprocess.crop_mode) == (1.0, "squash")
    assert found_in(read).sources["mean"] == "preprocessor_config.json"
    with pytest.raises(UserError, match="another network than vit_base_patch16_224"):
        toolchain.create_model("vit_base_patch16_224", weights=str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_networks_that_timm_cannot_express(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**SIZES)
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path / "head")
    with pytest.raises(UserError, match="class token and the mean"):
        toolchain.load(tmp_path / "head")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert' of transformers"):
        toolchain.load(tmp_path / "other")
