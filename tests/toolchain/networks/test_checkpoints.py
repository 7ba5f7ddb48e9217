"""Checkpoints as people have them: each loads with the outputs of the network that it was made of, or is refused."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.toolchain.networks.tiny import ARGS, PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.found import found_in
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.networks.said import said_in
from upvits.toolchain.networks.weight_files import read_weights

State = dict[str, torch.Tensor]
BOTH = pytest.mark.parametrize("name", [VIT, PVT])


def loaded(path: Path, name: str, **options: Any) -> nn.Module:
    given: dict[str, Any] = {"image_size": SIZE, "model_args": ARGS[name], **options}
    return toolchain.create_model(name, weights=str(path), **given)


def same(model: nn.Module, other: nn.Module, **options: Any) -> bool:
    return torch.allclose(outputs(model, **options), outputs(other, **options), rtol=1e-5, atol=1e-5)


def prefixed(state: State, *prefixes: str) -> State:
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """Weights of an earlier moment of the training."""
    return {name: tensor + 1 for name, tensor in state.items()}


KEYS: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.3},
    "net": lambda state: {"net": state, "acc": 91.0},
    "ema": lambda state: {"ema": state},
    "nested": lambda state: {"checkpoint": {"model": {"state_dict": state}}},
    "timm with ema": lambda state: {"state_dict": other(state), "state_dict_ema": state},
    "dino": lambda state: {
        "student": prefixed(other(state), "module.backbone."),
        "teacher": prefixed(state, "backbone.") | {"head.mlp.0.weight": torch.ones(4, 4)},
    },
    "the same twice": lambda state: {"model": state, "best": dict(state)},
    "ordered": lambda state: collections.OrderedDict(state),
    "module.": lambda state: prefixed(state, "module."),
    "_orig_mod.module.": lambda state: prefixed(state, "_orig_mod.", "module."),
    "module._orig_mod.": lambda state: prefixed(state, "module.", "_orig_mod."),
    "model.net.": lambda state: {"state_dict": prefixed(state, "model.", "net.")},
    "timm_model.": lambda state: prefixed(state, "timm_model."),
    "visual.trunk.": lambda state: prefixed(state, "visual.trunk.") | {"logit_scale": torch.ones(())},
    "averaged": lambda state: {"n_averaged": torch.tensor(4), **prefixed(state, "module.")},
    "counted": lambda state: {**state, "total_ops": torch.ones(1), "patch_embed.total_params": torch.ones(1)},
    "numpy": lambda state: {"model": {name: tensor.numpy() for name, tensor in state.items()}},
    "lightning": lambda state: {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(5)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "dirpath": pathlib.Path("a/b")}},
        "hyper_parameters": {"lr": 1e-3, "classes": list("abcde")},
        "optimizer_states": [{"state": {}}],
    },
    "namespace": lambda state: {
        "model": state,
        "args": argparse.Namespace(out=pathlib.Path("runs"), lr=np.float64(1e-3), steps=np.int64(3)),
        "history": collections.defaultdict(list, {"loss": [1.0]}),
        "seen": np.arange(3),
    },
}


@BOTH
@pytest.mark.parametrize("kind", KEYS)
def test_states_under_any_key_and_behind_any_wrapper(tmp_path: Path, name: str, kind: str) -> None:
    model = built(name)
    torch.save(KEYS[kind](model.state_dict()), tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth", name), model)


def test_what_was_read_is_said(tmp_path: Path) -> None:
    model = built(VIT)
    torch.save(KEYS["lightning"](model.state_dict()), tmp_path / "w.pth")
    read = loaded(tmp_path / "w.pth", VIT)
    notes = " ".join(found_in(read).notes)
    assert "'state_dict', names after 'model.'" in notes
    assert "left out: criterion.weight" in notes
    assert label_names_of(read) == tuple("abcde")


@BOTH
def test_shards_and_folders_without_a_config(tmp_path: Path, name: str) -> None:
    model = built(name)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"model-{number}.safetensors")
    index = {key: f"model-{number}.safetensors" for number, part in enumerate(parts) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert same(loaded(tmp_path / "model.safetensors.index.json", name), model)
    assert same(loaded(tmp_path, name), model)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 2 shards, of which 1 are not there: model-1"):
        loaded(tmp_path, name)
    outside = dict.fromkeys(index, "../model-0.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(UserError, match="outside"):
        loaded(tmp_path, name)


@BOTH
@pytest.mark.parametrize("serialization", [True, False, "both"])
def test_folders_of_timm(tmp_path: Path, name: str, serialization: Any) -> None:
    model: Any = built(name)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    timm.models.save_for_hf(
        model,
        tmp_path,
        model_config={"label_names": list("abcde")},
        model_args={**ARGS[name], "num_classes": 5, **({} if "pvt" in name else {"img_size": SIZE})},
        safe_serialization=serialization,
    )
    for read in (toolchain.load(tmp_path), toolchain.create_model(name, weights=f"local-dir:{tmp_path}")):
        assert same(read, model)
        assert label_names_of(read) == tuple("abcde")
        assert toolchain.preprocess_of(read).mean == (0.1, 0.2, 0.3)
        assert found_in(read).sources["mean"] == "config.json"


def test_two_networks_in_one_file_are_both_named(tmp_path: Path) -> None:
    state = built(VIT).state_dict()
    torch.save({"generator": state, "net": other(state)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"fit equally well: 'generator', 'net'"):
        loaded(tmp_path / "w.pth", VIT)


class Payload:
    """Unpickling it would call a function."""

    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.args


@pytest.mark.parametrize(
    "payload",
    [
        lambda path: Payload(Path.touch, path),
        lambda path: Payload(__import__("os").system, f"touch {path}"),
        lambda path: Payload(eval, f"open({str(path)!r}, 'w')"),
        lambda path: Payload(getattr, argparse.Namespace(), "x"),
        lambda path: argparse.Namespace(inner=Payload(Path.touch, path)),
        lambda path: collections.defaultdict(Path.cwd, {"x": path}),
        lambda path: np.array([Payload(Path.touch, path)], dtype=object),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_runs_whatever_stands_beside_the_tensors(
    tmp_path: Path, payload: Callable[[Path], object], zipped: bool
) -> None:
    holder = {"model": built(VIT).state_dict(), "args": payload(tmp_path / "ran")}
    torch.save(holder, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="more than tensors"):
        loaded(tmp_path / "w.pth", VIT)
    assert not (tmp_path / "ran").exists()


def cut_short(path: Path) -> None:
    torch.save(built(VIT).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)  # type: ignore[no-untyped-call]


def detector(path: Path) -> None:
    state = prefixed(built(PVT).state_dict(), "backbone.")
    torch.save({"state_dict": state | {"bbox_head.cls.weight": torch.ones(2)}}, path)


def jax(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(2))


def content(start: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(start)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (content(b""), "an empty file"),
    "truncated": (cut_short, "cut short"),
    "whole network": (lambda path: torch.save(built(VIT), path), r"whole pickled network \(VisionTransformer\)"),
    "TorchScript": (torchscript, "TorchScript"),
    "GGUF": (content(b"GGUF" + bytes(60)), "GGUF"),
    "ONNX": (content(b"\x08\x0a\x12\x07pytorch\x1a\x03" + bytes(40)), "an ONNX graph"),
    "LFS": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
    "page": (content(b"<!DOCTYPE html><html>"), "a web page"),
    "LoRA": (lambda path: torch.save({"blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 2)}, path), "a LoRA adapter"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no tensors"),
    "detector": (detector, "looks like a detector"),
    "ResNet": (lambda path: torch.save(timm.create_model("resnet10t").state_dict(), path), "a ResNet"),
    "jax": (jax, "JAX"),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_named(tmp_path: Path, kind: str) -> None:
    write, words = FILES[kind]
    path = tmp_path / "w.pth"
    write(path)
    with pytest.raises(UserError, match=words) as caught:
        loaded(path, VIT)
    assert caught.value.fix
    assert re.search(r"[\x00-\x09\x0b-\x1f]", str(caught.value)) is None


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(2**20, 2**12), torch.empty(4, 4, device="meta"), torch.eye(4).to_sparse()],
    ids=["expanded", "meta", "sparse"],
)
def test_tensors_that_are_larger_than_what_is_stored_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"weight": tensor}, tmp_path / "few_bytes.pth")
    with pytest.raises(UserError, match="larger than what is stored"):
        read_weights(tmp_path / "few_bytes.pth")


def test_dictionaries_that_hold_one_another_are_walked_once(tmp_path: Path) -> None:
    content: dict[str, object] = {"weight": torch.ones(3)}
    for _ in range(6):
        content = {f"part{number}": content for number in range(40)}  # 40 to the sixth ways to one tensor
    torch.save(content, tmp_path / "laughs.pth")
    assert sum(len(state) for state in read_weights(tmp_path / "laughs.pth").states.values()) == 1


def test_settings_that_hold_themselves_or_stand_for_endless_text_are_left_out(tmp_path: Path) -> None:
    laughs: list[object] = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    args: dict[object, object] = {"eval_metric": laughs, 10**500: 1}
    args["args"] = args["config"] = args["meta"] = args
    content = {"weight": torch.ones(3), "args": args, "acc": argparse.Namespace(item=1, ndim=0), 10**500: 1}
    torch.save(content, tmp_path / "endless.pth")
    assert said_in(read_weights(tmp_path / "endless.pth").beside).accuracy is None


class Much:
    """A pickle of it asks for 100 GB."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (10**11,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "compressed"])
def test_files_that_would_grow_in_memory_are_refused_before_they_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": Much()}, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "compressed":
        torch.save({"w": torch.zeros(3)}, tmp_path / "plain.pth")
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for entry in plain.infolist():
                file.writestr(entry.filename, plain.read(entry))
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_weights(path)
