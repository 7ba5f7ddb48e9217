"""timm objects that users built or edited: saved and loaded, they compute the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.toolchain.networks.tiny import ARGS, PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of, narrow
from upvits.toolchain.networks.edited import as_timm_builds
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.structure.groups import Widths

HEADS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(32, 7), 7),
    "dropout and linear": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 7)), 7),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Dropout(), nn.Identity()), nn.Linear(32, 3)), 3),
    "without bias": (lambda: nn.Linear(32, 7, bias=False), 7),
    "none": (nn.Identity, 0),
    "dropout alone": (lambda: nn.Sequential(nn.Dropout()), 0),
}


def round_trip(model: nn.Module, folder: Path, size: Any = SIZE, channels: int = 3) -> nn.Module:
    """Saved, loaded, and the same outputs."""
    toolchain.save(model, folder)
    read = toolchain.load(folder)
    ours, theirs = outputs(read, size, channels), outputs(model, size, channels)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    return read


@pytest.mark.parametrize("name", [VIT, PVT])
@pytest.mark.parametrize("kind", HEADS)
def test_other_heads(tmp_path: Path, name: str, kind: str) -> None:
    make, classes = HEADS[kind]
    model: Any = built(name)
    model.head = make()
    model.eval()
    assert model.num_classes == 5
    read = round_trip(model, tmp_path / "m")
    assert read.num_classes == classes
    assert model.num_classes == 5  # the user's object stays as it is
    assert type(model.head) is type(make())


def test_both_heads_of_a_distilled_network(tmp_path: Path) -> None:
    model: Any = built("deit_tiny_distilled_patch16_224")
    model.head, model.head_dist = nn.Linear(32, 7), nn.Sequential(nn.Dropout(), nn.Linear(32, 7))
    assert round_trip(model.eval(), tmp_path / "m").num_classes == 7


@pytest.mark.parametrize("name", [VIT, PVT])
def test_names_of_classes_that_the_head_no_longer_has(tmp_path: Path, name: str) -> None:
    model: Any = built(name)
    model.pretrained_cfg.update(num_classes=5, label_names=list("abcde"))
    assert label_names_of(round_trip(model, tmp_path / "five")) == tuple("abcde")
    model.head = nn.Linear(32, 7)
    assert label_names_of(round_trip(model, tmp_path / "seven")) is None


@pytest.mark.parametrize("name", [VIT, PVT])
def test_heads_of_several_layers_are_refused(tmp_path: Path, name: str) -> None:
    model: Any = built(name)
    model.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 7))
    with pytest.raises(UserError, match="more than one linear layer: LayerNorm, Linear"):
        toolchain.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="a head of several layers"):
        toolchain.score(model, method="magnitude")


VITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers and scales": {"patch_size": 8, "init_values": 1e-4, "reg_tokens": 2, "no_embed_class": True},
    "average": {"global_pool": "avg"},
    "average without class token": {"global_pool": "avg", "class_token": False},
    "one channel": {"in_chans": 1},
    "activation and norm": {"act_layer": nn.ReLU, "norm_layer": partial(nn.LayerNorm, eps=1e-4)},
    "tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "norm before, no biases": {"pre_norm": True, "qkv_bias": False, "proj_bias": False},
    "not square": {"img_size": (32, 48)},
    "any size": {"dynamic_img_size": True},
    "no head": {"num_classes": 0},
    "no positions": {"pos_embed": "none"},
    "wide": {"embed_dim": 1056},
}
PVTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"linear": True},
    "other reductions": {"sr_ratios": (4, 2, 2, 1)},
    "no head": {"num_classes": 0},
    "one channel": {"in_chans": 1},
}


def random(model: nn.Module) -> nn.Module:
    """Every tensor matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", VITS)
def test_a_vision_transformer_of_its_class(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    args = {"img_size": SIZE, "num_classes": 5, **ARGS[VIT], **VITS[kind]}
    model = random(VisionTransformer(**args))
    with caplog.at_level(logging.WARNING):
        round_trip(model, tmp_path / "m", args["img_size"], args.get("in_chans", 3))
    assert "says nothing of its architecture and its images" in caplog.text
    assert not hasattr(model, "pretrained_cfg")


@pytest.mark.parametrize("kind", PVTS)
def test_a_pyramid_of_its_class(tmp_path: Path, kind: str) -> None:
    model = random(PyramidVisionTransformerV2(**{"num_classes": 5, **ARGS[PVT], **PVTS[kind]}))
    round_trip(model, tmp_path / "m", 64, PVTS[kind].get("in_chans", 3))


@pytest.mark.parametrize("name", [VIT, PVT])
@pytest.mark.filterwarnings("ignore")
def test_one_channel_of_timms_own(tmp_path: Path, name: str) -> None:
    read = round_trip(built(name, in_chans=1), tmp_path / "m", SIZE, 1)
    with pytest.raises(UserError, match="no RGB pictures"):
        toolchain.preprocess_of(read)


@pytest.mark.parametrize("name", [VIT, PVT])
def test_they_can_be_pruned(tmp_path: Path, name: str) -> None:
    kinds: dict[str, Any] = {VIT: VisionTransformer, PVT: PyramidVisionTransformerV2}
    sizes: dict[str, Any] = {VIT: {"img_size": SIZE, "embed_dim": 64, "depth": 2, "num_heads": 2}, PVT: ARGS[PVT]}
    model: Any = random(kinds[name](num_classes=5, **sizes[name]))
    model.head = nn.Linear(model.num_features, 7)
    plan = toolchain.plan(
        model, toolchain.score(model, method="magnitude"), ratio=0.3, align=1, input_size=(3, SIZE, SIZE)
    )
    pruned = toolchain.prune(model, plan, compensate=False)
    assert round_trip(pruned, tmp_path / "m").num_classes == 7


def test_what_is_no_network_of_ours_stays_as_it_is() -> None:
    layer = nn.Linear(2, 2)
    assert as_timm_builds(layer) is layer


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 256, "num_heads": 8, "depth": 2}, SIZE),
        (PVT, {"embed_dims": (64, 128, 160, 256), "depths": (2, 1, 1, 1)}, 64),
    ],
)
def test_uneven_widths_of_networks_wider_than_their_names_say(
    tmp_path: Path, name: str, args: dict[str, Any], size: int
) -> None:
    model = toolchain.create_model(name, weights="random", num_classes=5, image_size=size, model_args=args)
    groups = groups_of(model)
    sizes = {group.name: group.size for group in groups if group.kind == "ffn"}
    attention = next(group for group in groups if group.kind == "attention")
    uneven = {**sizes, next(iter(sizes)): 40, attention.name: attention.size - attention.num_heads}
    cut = narrow(model, Widths(uneven, {})).to_empty(device="cpu")
    for parameter in cut.parameters():
        nn.init.normal_(parameter, std=0.1)
    round_trip(cut.eval(), tmp_path / "m", size)
