"""Tensors in the layouts of official repositories: the outputs are those that timm gets of the same file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.toolchain.networks.tiny import ARGS, PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.found import found_in

State = dict[str, torch.Tensor]
TINY = ARGS[VIT]
DINO, REGISTERS, CLIP = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_base_patch32_clip_224"


def official_pvt(state: State) -> State:
    result = {}
    for name, tensor in state.items():
        name = name.replace("patch_embed.", "patch_embed1.", 1) if name.startswith("patch_embed.") else name
        name = re.sub(r"^stages\.(\d)\.downsample\.", lambda match: f"patch_embed{int(match[1]) + 1}.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", lambda match: f"block{int(match[1]) + 1}.", name)
        name = re.sub(r"^stages\.(\d)\.norm\.", lambda match: f"norm{int(match[1]) + 1}.", name)
        result[name.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")] = tensor
    return result


def dinov2(state: State) -> State:
    return {**state, "mask_token": torch.ones(1, 32)}


def dinov2_in_chunks(state: State) -> State:
    chunked = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", name): tensor for name, tensor in state.items()}
    return {f"teacher.backbone.{name}": tensor for name, tensor in dinov2(chunked).items()}


def registers(state: State) -> State:
    """The official file adds the class token's position later."""
    state = dict(state)
    offset = torch.full((1, 1, 32), 0.25)
    return {
        **{name: tensor for name, tensor in state.items() if name != "reg_token"},
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - offset,
        "pos_embed": torch.cat([offset, state["pos_embed"]], dim=1),
        "mask_token": torch.ones(1, 32),
    }


def mae(state: State) -> dict[str, Any]:
    extra = {"mask_token": torch.ones(1, 1, 16), "decoder_pos_embed": torch.ones(1, 5, 16)}
    blocks = {"decoder_blocks.0.norm1.weight": torch.ones(16), "decoder_embed.weight": torch.ones(16, 32)}
    return {"model": {**state, **extra, **blocks}, "epoch": 800}


def open_clip(state: State) -> State:
    result: State = {
        "visual.class_embedding": state["cls_token"][0, 0],
        "visual.positional_embedding": state["pos_embed"][0],
    }
    swaps = [
        ("patch_embed.proj", "conv1"), ("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"),
        ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]  # fmt: skip
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embed", "head.bias"):
            continue
        for old, new in swaps:
            name = name.replace(old, new)
        name = re.sub(r"\bnorm(\d)", r"ln_\1", name)
        name = re.sub(r"^norm\.", "ln_post.", name)
        result["visual.proj" if name == "head.weight" else f"visual.{name}"] = (
            tensor.T if name == "head.weight" else tensor
        )
    text = {"token_embedding.weight": torch.ones(4, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    return {**result, **text, "logit_scale": torch.ones(()), "positional_embedding": torch.ones(4, 4)}


LAYOUTS: dict[str, tuple[str, dict[str, Any], Callable[[State], Any], int]] = {
    "official PVTv2": (PVT, {}, official_pvt, 5),
    "official PVTv2 behind a prefix": (
        PVT, {}, lambda state: {f"module.{n}": t for n, t in official_pvt(state).items()}, 5,
    ),
    "official PVTv2 without head": (PVT, {}, official_pvt, 0),
    "linear PVTv2": ("pvt_v2_b2_li", {}, official_pvt, 5),
    "DINOv2": (DINO, {"init_values": 1.0}, dinov2, 0),
    "DINOv2 in chunks": (DINO, {}, dinov2_in_chunks, 0),
    "DINOv2 with registers": (REGISTERS, {}, registers, 0),
    "MAE": ("vit_base_patch16_224", {}, mae, 0),
    "DeiT": (VIT, {}, lambda state: {"model": state}, 5),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {}, lambda state: {"model": state}, 5),
    "DeiT-III": (
        "deit3_small_patch16_224", {},
        lambda state: {"model": {re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): t for n, t in state.items()}}, 5,
    ),
}  # fmt: skip


def side_of(name: str) -> int:
    return 28 if "patch14" in name else 64 if "patch32" in name else SIZE


def written(path: Path, name: str, args: dict[str, Any], layout: Callable[[State], Any], classes: int) -> nn.Module:
    model = built(name, classes=classes, size=side_of(name), **args)
    torch.save(layout({key: tensor.clone() for key, tensor in model.state_dict().items()}), path)
    return model


@pytest.mark.parametrize("kind", LAYOUTS)
def test_files_of_official_repositories(tmp_path: Path, kind: str) -> None:
    name, args, layout, classes = LAYOUTS[kind]
    model = written(tmp_path / "w.pth", name, args, layout, classes)
    tiny = ARGS[PVT] if "pvt" in name else TINY
    read = toolchain.create_model(
        name, weights=str(tmp_path / "w.pth"), image_size=side_of(name), model_args={**tiny, **args}
    )
    assert read.num_classes == classes
    assert torch.allclose(outputs(read, side_of(name)), outputs(model, side_of(name)), rtol=1e-5, atol=1e-5)
    extra = " ".join(found_in(read).notes)
    assert ("mask_token" in extra) == (kind.startswith(("DINOv2", "MAE")))


def test_clip_asks_for_the_activation(tmp_path: Path) -> None:
    model = written(tmp_path / "w.pth", CLIP, {"act_layer": "quick_gelu"}, open_clip, 5)
    with pytest.raises(UserError, match="Which activation") as caught:
        toolchain.create_model(CLIP, weights=str(tmp_path / "w.pth"), model_args=TINY)
    assert "quick_gelu" in caught.value.fix
    read = toolchain.create_model(
        CLIP, weights=str(tmp_path / "w.pth"), model_args={**TINY, "act_layer": "quick_gelu"}, image_size=64
    )
    model.get_parameter("head.bias").data.zero_()  # CLIP's projection has none
    assert torch.allclose(outputs(read, 64), outputs(model, 64), rtol=1e-5, atol=1e-5)
    assert "token_embedding.weight" in " ".join(found_in(read).notes)


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "dropout and linear": lambda width: nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 7)),
    "one linear": lambda width: nn.Linear(width, 7),
}


@pytest.mark.parametrize("name", [VIT, PVT])
@pytest.mark.parametrize("head", HEADS)
def test_heads_that_people_put_on(tmp_path: Path, name: str, head: str) -> None:
    model: Any = built(name)
    model.head = HEADS[head](32)
    torch.save(model.eval().state_dict(), tmp_path / "w.pth")
    read = toolchain.create_model(name, weights=str(tmp_path / "w.pth"), image_size=SIZE, model_args=ARGS[name])
    assert read.num_classes == 7
    assert torch.allclose(outputs(read), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [VIT, PVT])
def test_a_network_in_a_network(tmp_path: Path, name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.classifier = built(name, classes=0), nn.Linear(32, 4)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.classifier(self.backbone(image))
            return result

    net = Net().eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    read = toolchain.create_model(name, weights=str(tmp_path / "w.pth"), image_size=SIZE, model_args=ARGS[name])
    assert torch.allclose(outputs(read), outputs(net), rtol=1e-5, atol=1e-5)
    assert "The classifier is 'classifier' of the file." in found_in(read).notes


def test_a_head_of_two_layers_is_refused(tmp_path: Path) -> None:
    model: Any = built(VIT)
    model.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"head\.2\.weight"):
        toolchain.create_model(VIT, weights=str(tmp_path / "w.pth"), model_args=TINY)


def test_other_inputs(tmp_path: Path) -> None:
    model = built(VIT, size=(32, 128), in_chans=1, dynamic_img_size=True)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    given: dict[str, Any] = {"weights": str(tmp_path / "w.pth"), "model_args": {**TINY, "dynamic_img_size": True}}
    read = toolchain.create_model(VIT, **given, image_size=(32, 128))
    with pytest.raises(UserError, match="no RGB pictures"):
        toolchain.preprocess_of(read)
    assert torch.equal(outputs(read, (32, 128), 1), outputs(model, (32, 128), 1))
    square = toolchain.create_model(VIT, **given)
    assert square.get_submodule("patch_embed").img_size == (64, 64)
    assert found_in(square).sources["input_size"] == "its position embedding, taken as a square"
    assert found_in(square).other_sizes == ((32, 128), (128, 32))
    assert found_in(read).other_sizes == ()
    torch.save(built(VIT, size=(32, 48)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="6 patches, which is no square"):
        toolchain.create_model(VIT, weights=str(tmp_path / "w.pth"), model_args=TINY)


def test_patches_of_another_size(tmp_path: Path) -> None:
    torch.save(built(VIT, patch_size=8).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight is \(32, 3, 8, 8\)"):
        toolchain.create_model(VIT, weights=str(tmp_path / "w.pth"), model_args=TINY)
    read = toolchain.create_model(VIT, weights=str(tmp_path / "w.pth"), model_args={**TINY, "patch_size": 8})
    assert toolchain.preprocess_of(read).input_size == (3, 32, 32)
