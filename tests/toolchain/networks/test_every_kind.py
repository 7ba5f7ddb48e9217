"""The table of checkpoints that people bring: each is made by the library itself where that is installed, and loads
with the outputs of its maker to 1e-5, or is refused with words that say what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tests.toolchain.networks.test_checkpoints import KEYS, cut_short, detector, torchscript
from tests.toolchain.networks.test_layouts import (
    CLIP,
    DINO,
    LAYOUTS,
    REGISTERS,
    dinov2,
    mae,
    official_pvt,
    open_clip,
    registers,
    side_of,
)
from tests.toolchain.networks.test_settled import trained
from tests.toolchain.networks.tiny import ARGS, PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = (VIT, PVT)


@dataclass(frozen=True)
class Row:
    """A kind of checkpoint.

    Attributes:
        kind: what people call it.
        name: of the architecture.
        write: makes it in a folder, of a network; returns what `--weights` gets.
        network: timm's arguments of the network.
        options: of `create_model`; None: the folder says everything.
    """

    kind: str
    name: str
    write: Callable[[nn.Module, Path], Path]
    network: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = field(default_factory=dict)


def file(make: Callable[[dict[str, Tensor]], Any], name: str = "w.pth") -> Callable[[nn.Module, Path], Path]:
    """Saved by torch, of the state of a network."""

    def write(model: nn.Module, folder: Path) -> Path:
        torch.save(make({key: tensor.clone() for key, tensor in model.state_dict().items()}), folder / name)
        return folder / name

    return write


def safetensors(model: nn.Module, folder: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


def sharded(model: nn.Module, folder: Path) -> Path:
    state = list(model.state_dict().items())
    index: dict[str, str] = {}
    for number in range(3):
        part = dict(state[number::3])
        save_file(part, folder / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder / "model.safetensors.index.json"


def for_hf(safe: bool) -> Callable[[nn.Module, Path], Path]:
    def write(model: nn.Module, folder: Path) -> Path:
        timm.models.save_for_hf(model, str(folder / "hub"), safe_serialization=safe)
        assert (folder / "hub" / ("model.safetensors" if safe else "pytorch_model.bin")).exists()
        return folder / "hub"

    return write


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module, Path], Path]:
    """The state of what a library makes of the network."""

    def write(model: nn.Module, folder: Path) -> Path:
        torch.save(wrap(model).state_dict(), folder / "w.pth")
        return folder / "w.pth"

    return write


def averaged(model: nn.Module) -> nn.Module:
    result: nn.Module = torch.optim.swa_utils.AveragedModel(model)
    return result


def compiled(model: nn.Module) -> nn.Module:
    result: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return result


def training(name: str) -> Callable[[nn.Module, Path], Path]:
    return lambda model, folder: trained(folder / "run", name, model, img_size=SIZE)


def ours(model: nn.Module, folder: Path) -> Path:
    toolchain.save(model, folder / "model")
    return folder / "model"


def rows() -> Iterator[Row]:
    """The kinds that timm, torch and the official repositories leave."""
    for name in BOTH:
        given: dict[str, Any] = {"image_size": SIZE, "model_args": ARGS[name]}
        yield Row("state_dict, torch", name, file(lambda state: state), options=given)
        yield Row("state_dict, legacy torch", name, legacy, options=given)
        yield Row("state_dict, safetensors", name, safetensors, options=given)
        yield Row("timm's training, with arguments", name, training(name), options={"model_args": ARGS[name]})
        yield Row("timm's ModelEmaV3", name, wrapped(ModelEmaV3), options=given)
        yield Row("timm's save_for_hf, safetensors", name, for_hf(True), options=None)
        yield Row("timm's save_for_hf, pytorch_model.bin", name, for_hf(False), options=None)
        yield Row("torch's DataParallel", name, wrapped(nn.DataParallel), options=given)
        yield Row("torch.compile", name, wrapped(compiled), options=given)
        yield Row("torch's AveragedModel", name, wrapped(averaged), options=given)
        yield Row("DataParallel in torch.compile", name, wrapped(lambda m: compiled(nn.DataParallel(m))), options=given)
        yield Row("sharded safetensors", name, sharded, options=given)
        yield Row("a folder of ours", name, ours, options=None)
        for key, make in KEYS.items():
            yield Row(f"dictionary: {key}", name, file(make), options=given)
    yield Row("official PVTv2", PVT, file(official_pvt), options={"image_size": SIZE, "model_args": ARGS[PVT]})
    tiny: dict[str, Any] = {"model_args": ARGS[VIT]}
    scaled = {"model_args": {**ARGS[VIT], "init_values": 1.0}}
    yield Row("official DINOv2", DINO, file(dinov2), {"init_values": 1.0, "classes": 0}, scaled)
    yield Row("official DINOv2 with registers", REGISTERS, file(registers), {"classes": 0}, tiny)
    yield Row("official MAE", "vit_base_patch16_224", file(mae), {"classes": 0}, tiny)
    yield Row("official DeiT", VIT, file(lambda state: {"model": state}), {}, tiny)
    quick = {"model_args": {**ARGS[VIT], "act_layer": "quick_gelu"}, "image_size": side_of(CLIP)}
    yield Row("OpenCLIP's naming", CLIP, file(open_clip), {"act_layer": "quick_gelu"}, quick)


def legacy(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "w.pth", _use_new_zipfile_serialization=False)
    return folder / "w.pth"


ROWS = {f"{row.kind} ({'PVTv2' if 'pvt' in row.name else 'ViT'})": row for row in rows()}


@pytest.mark.parametrize("kind", ROWS)
def test_it_loads_with_the_outputs_of_its_maker(tmp_path: Path, kind: str) -> None:
    row = ROWS[kind]
    side = side_of(row.name)
    model = built(row.name, size=side, **row.network)
    if row.kind == "OpenCLIP's naming":
        model.get_parameter("head.bias").data.zero_()  # its projection has none
    path = row.write(model, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if row.options is None:
        read = toolchain.load(path)
    else:
        read = toolchain.create_model(row.name, weights=str(path), **row.options)
    assert torch.allclose(outputs(read, side), outputs(model, side), rtol=1e-5, atol=1e-5)
    assert sorted(tmp_path.rglob("*")) == before


OF_TRANSFORMERS = (
    "ViTForImageClassification", "DeiTForImageClassification", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel",
    "PvtV2ForImageClassification",
)  # fmt: skip


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
@pytest.mark.parametrize("form", ["folder", "shards", "pytorch_model.bin", "names in memory", "file alone"])
def test_transformers_in_every_form(tmp_path: Path, kind: str, form: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.toolchain.networks.test_transformers import made, theirs

    network = made(kind)
    network.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if form == "shards" else {}))
    if form in ("pytorch_model.bin", "names in memory"):
        state = load_file(tmp_path / "model.safetensors") if form == "pytorch_model.bin" else network.state_dict()
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    side = 64 if kind.startswith("Pvt") else SIZE
    if form == "file alone":
        name = {"Pvt": PVT, "Din": DINO}.get(kind[:3], "vit_base_patch16_224")
        args: dict[str, Any] = dict(ARGS[PVT])
        if name != PVT:
            args = {**ARGS[VIT], "mlp_ratio": 72 / 32, "patch_size": 16}
            args |= {"mlp_ratio": 4.0, "init_values": 1.0} if kind.startswith("Dino") else {}
            args |= {"act_layer": "gelu_tanh", "qkv_bias": False} if kind == "ViTModel" else {}
            args |= {"reg_tokens": 1} if kind.startswith("DeiT") else {}
            args |= {"reg_tokens": 4, "no_embed_class": True} if "Registers" in kind else {}
        read = toolchain.create_model(
            name, weights=str(tmp_path / "model.safetensors"), image_size=side, model_args=args
        )
        tolerance = 1e-4  # epsilons of norms stand in config.json alone
    else:
        read, tolerance = toolchain.load(tmp_path), 1e-5
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(read(image), theirs(network, image), rtol=tolerance, atol=tolerance)


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    save_file(
        {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors"
    )
    return folder


def shard_missing(folder: Path) -> Path:
    path = sharded(built(VIT), folder)
    (folder / "model-1.safetensors").unlink()
    return path


def short_safetensors(folder: Path) -> Path:
    path = safetensors(built(VIT), folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def saved(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


def two(path: Path) -> None:
    state = built(VIT).state_dict()
    torch.save({"first": state, "second": {key: tensor + 1 for key, tensor in state.items()}}, path)


def whole(path: Path) -> None:
    torch.save(built(VIT), path)


REFUSED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "two networks": (saved("w.pth", two), "fit equally well: 'first', 'second'", "a file of its own"),
    "a detector": (saved("w.pth", detector), "looks like a detector", "upvits-deploy detect"),
    "a whole module": (saved("w.pth", whole), "whole pickled network", "state_dict"),
    "TorchScript": (saved("w.pt", torchscript), "TorchScript", "torch.jit.load"),
    "ONNX": (saved("m.onnx", lambda path: path.write_bytes(b"x" * 64)), "an ONNX graph", "exported"),
    "GGUF": (saved("w.gguf", lambda path: path.write_bytes(b"GGUF" + bytes(60))), "GGUF", "made from"),
    "a LoRA adapter": (adapter, "a LoRA adapter", "Merge it"),
    "empty": (saved("w.safetensors", Path.touch), "an empty file", "Get it again"),
    "truncated": (saved("w.pth", cut_short), "cut short", "Get it again"),
    "truncated safetensors": (short_safetensors, "cannot be read as a checkpoint", "complete"),
    "a detector as what it has inside": (saved("w.pth", detector), "looks like a detector", "docs/detection.md"),
    "a shard is missing": (shard_missing, "names 3 shards, of which 1 are not there", "beside the index"),
    "nothing there": (lambda folder: folder / "no.pth", "There is no checkpoint file", "Give a"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_with_the_right_words(tmp_path: Path, kind: str) -> None:
    write, words, advice = REFUSED[kind]
    path = write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    name = PVT if "inside" in kind else VIT
    with pytest.raises(UserError, match=words) as caught:
        toolchain.create_model(name, weights=str(path), model_args=ARGS[name])
    assert advice in caught.value.fix
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mean_for_other_channels_is_refused(tmp_path: Path) -> None:
    path = safetensors(built(VIT), tmp_path)
    with pytest.raises(UserError, match="2 numbers, but the network reads 3 channels"):
        toolchain.create_model(VIT, weights=str(path), model_args=ARGS[VIT], preprocess={"mean": (0.5, 0.5)})


def test_the_table_has_every_layout() -> None:
    assert len(ROWS) > 70
    assert {"official PVTv2", "DINOv2", "DINOv2 with registers", "MAE", "DeiT"} <= LAYOUTS.keys()
