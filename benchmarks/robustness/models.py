"""Model folders, safetensors and checkpoints that lie, run code, or need more memory than there is."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.robustness.case import CUT, Arguments, Case, Ground
from benchmarks.robustness.mutations import DAMAGES, mutated, no_documents, shown, written

_EACH = 130
_WEIGHTS = "model.safetensors"


class Payload:
    """Runs `touch MARKER` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def plan_of(ground: Ground, weights: str | Path) -> Arguments:
    """The shortest command that loads weights."""
    return ["plan", *CUT, "--weights", weights, "--data", f"imagefolder:{ground.photos}"]


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """config.json with one change, with entries that timm would follow elsewhere, and what is no document."""
    content = (ground.dense / "config.json").read_bytes()
    document = json.loads(content)
    pruned = json.loads((ground.run / "3-distill/model/config.json").read_text())
    for number in range(_EACH):
        what, changed = mutated((document, pruned)[number % 4 == 0], random)
        yield _config(ground, what, written(changed))
    for part, more in _calls_for_more(ground):
        what = ", ".join(f"{part} {name} = {shown(value)}" for name, value in more.items())
        within = {part: {**document[part], **more}} if part else more
        yield _config(ground, what, written({**document, **within}))
    for what, raw in no_documents(content).items():
        yield _config(ground, what, raw)
    for name in ("config.json", _WEIGHTS):
        for what in DAMAGES:
            arrange = functools.partial(_damaged, ground, name, what)
            yield Case(f"model folder: {name} {what}", arrange)


def _calls_for_more(ground: Ground) -> Iterator[tuple[str, dict[str, Any]]]:
    """Entries that make timm open another file, go to the hub, or build something immense."""
    payload = str(ground.case / "payload.pth")
    arguments: tuple[dict[str, Any], ...] = (
        {"checkpoint_path": payload},
        {"pretrained": True},
        {"pretrained_cfg": {"file": payload}, "pretrained": True},
        {"pretrained_cfg_overlay": {"file": payload}},
        {"cache_dir": "/proc"},
        {"features_only": True},
        {"norm_layer": "os.system"},
        {"act_layer": "os.system"},
        {"block_fn": "os.system"},
        {"scriptable": True},
        {"num_classes": 3},
        {"model_name": "resnet18"},
        {"depth": 10**6},
        {"depth": 0},
        {"embed_dim": 10**6},
        {"embed_dim": 0},
        {"num_heads": 0},
        {"num_heads": 7},
        {"img_size": 10**6},
        {"img_size": [10**6, 10**6]},
        {"mlp_ratio": 1e9},
        {"patch_size": 1},
        {"in_chans": 10**6},
        {"global_pool": "map"},
        {"dynamic_img_size": True},
        {"weight_init": "jax_nlhb"},
        {"class_token": False},
        {"reg_tokens": 10**7},
        {"device": "meta"},
        {"dtype": "evil"},
    )
    for more in arguments:
        yield "model_args", more
    entries: tuple[dict[str, Any], ...] = (
        {"file": payload}, {"url": "file:///etc/passwd"}, {"hf_hub_id": "evil/model"}, {"custom_load": True},
        {"state_dict": payload}, {"input_size": [3, 10**6, 10**6]}, {"input_size": [1, 32, 32]}, {"std": [0, 0, 0]},
        {"mean": [float("nan")] * 3}, {"crop_pct": 1e-9}, {"crop_pct": 1e9}, {"interpolation": "random"},
        {"label_names": ["\x1b[31mx", "y"]}, {"label_names": ["a"] * 2}, {"label_names": [[1]] * 2},
        {"classifier": "../../x"}, {"first_conv": "__class__"}, {"num_classes": 10**9},
    )  # fmt: skip
    for more in entries:
        yield "pretrained_cfg", more
    for name in ("hf-hub:evil/model", f"local-dir:{ground.dense}", "../../x", "resnet18", "", "a\0b", "__init__"):
        yield "", {"architecture": name}
    for number in (-1, 0, 10**6, 10**12, 10**30, 1.5):
        yield "", {"num_classes": number}
    for widths in (
        {"format": 99, "widths": {}},
        {"format": 1, "widths": {"embed": 10**12}},
        {"format": 1, "widths": "x"},
    ):
        yield "", {"upvits": widths}


def _config(ground: Ground, what: str, raw: bytes) -> Case:
    def arrange(here: Path) -> Arguments:
        torch.save({"state_dict": Payload(ground.marker)}, here / "payload.pth")
        (here / "m").mkdir()
        (here / "m" / "config.json").write_bytes(raw)
        shutil.copyfile(ground.dense / _WEIGHTS, here / "m" / _WEIGHTS)
        return plan_of(ground, here / "m")

    return Case(f"config.json: {what}", arrange)


def _damaged(ground: Ground, name: str, what: str, here: Path) -> Arguments:
    shutil.copytree(ground.dense, here / "m")
    DAMAGES[what](here / "m" / name)
    return plan_of(ground, here / "m")


def safetensors(ground: Ground, random: Random) -> Iterator[Case]:
    """Files whose headers lie about lengths, shapes, types and names."""
    content = (ground.dense / _WEIGHTS).read_bytes()
    length = int(struct.unpack("<Q", content[:8])[0])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    files = {
        what: _file(raw, body) for what, raw in no_documents(content[8 : 8 + length]).items() if len(raw) < 1 << 20
    }
    for number in (0, 7, length - 1, 10**9, 2**63, 2**64 - 1):
        files[f"header of {number} bytes"] = struct.pack("<Q", number) + content[8:]
    for _ in range(30):
        what, changed = mutated(header, random)
        files[f"header: {what}"] = _file(written(changed), body)
    zero = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    files |= {
        "7 bytes": content[:7], "more bytes": content + b"x" * 100, "half": content[: len(content) // 2],
        "no numbers": _file(written(header), b"\xff" * len(body)), "zeros": _file(written(header), bytes(len(body))),
        "100,000 names": _file(written({f"t{i}": {**zero, "data_offsets": [0, 0]} for i in range(100_000)}), b""),
        "a name with commands": _file(written({**header, "\x1b[31mx[/]": zero}), body),
    }  # fmt: skip
    for what, raw in files.items():
        for kind in ("file", "folder"):
            yield Case(f"safetensors ({kind}): {what}", functools.partial(_tensors, ground, kind, raw))


def _file(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def _tensors(ground: Ground, kind: str, raw: bytes, here: Path) -> Arguments:
    (here / _WEIGHTS).write_bytes(raw)
    shutil.copyfile(ground.dense / "config.json", here / "config.json")
    return plan_of(ground, here if kind == "folder" else here / _WEIGHTS)


def pickles(ground: Ground, random: Random) -> Iterator[Case]:
    """Checkpoints with payloads, and with tensors that are no plain ones, wherever weights or documents may stand."""
    payload = Payload(ground.marker)
    trees: dict[str, Any] = {
        "a payload": payload, "a payload beside weights": {"head.weight": torch.zeros(2, 48), "x": payload},
        "state_dict is a payload": {"state_dict": payload}, "a payload as a key": {"model": {(payload,): 1}},
        "a module": torch.nn.Linear(2, 2), "arguments of a script": {"args": Namespace(x=1), "w": torch.zeros(1)},
        "objects in numpy": {"state_dict": {"w": np.array([payload], dtype=object)}}, "a list": [torch.zeros(1)],
        "a tensor": torch.zeros(3), "numbers as names": {1: torch.zeros(1)}, "no tensors": {"state_dict": {"a": 1}},
        "sparse": {"w": torch.zeros(3).to_sparse()}, "sparse rows": {"w": torch.eye(3).to_sparse_csr()},
        "meta": {"w": torch.zeros(1, device="meta")}, "complex": {"w": torch.zeros(1, dtype=torch.complex64)},
        "expanded to 4 TB": {"w": torch.zeros(1).expand(10**6, 10**6)}, "bool": {"w": torch.zeros(3, dtype=torch.bool)},
        "itself": _circle(), "nested": {"model": {"model": {"model": {"state_dict": {}}}}}, "float8": _float8(),
    }  # fmt: skip
    for what, tree in trees.items():
        for zipped in (True, False):
            yield Case(
                f"checkpoint: {what}{'' if zipped else ', old format'}", functools.partial(_saved, ground, tree, zipped)
            )
    raws = {f"pickle protocol {number}": pickle.dumps(payload, protocol=number) for number in range(6)}
    for what, raw in raws.items():
        for name in ("w.pth", "w.safetensors", "w.npz", "w.bin", "m/model.safetensors", "m/config.json", "r.toml"):
            yield Case(f"{what} as {name}", functools.partial(_raw, ground, raw, name), "refused")
    for command in ("bench", "report", "package"):
        raw = raws["pickle protocol 4"]
        yield Case(f"{command} of a pickle", functools.partial(_command_on, command, raw), "refused")
    kept = ("3-distill/model/model.safetensors", "1-score/scores.safetensors", "2-prune/plan.json", "report.json")
    for name in kept:
        yield Case(f"build, {name} is a pickle", functools.partial(_in_run, ground, name, raws["pickle protocol 4"]))


def _circle() -> dict[str, Any]:
    tree: dict[str, Any] = {"w": torch.zeros(1)}
    tree["state_dict"] = tree
    return tree


def _float8() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(3).to(torch.float8_e4m3fn)}


def _saved(ground: Ground, tree: Any, zipped: bool, here: Path) -> Arguments:
    torch.save(tree, here / "w.pth", _use_new_zipfile_serialization=zipped)
    return plan_of(ground, here / "w.pth")


def _raw(ground: Ground, raw: bytes, name: str, here: Path) -> Arguments:
    path = here / name
    if path.parent != here:
        shutil.copytree(ground.dense, path.parent)
    path.write_bytes(raw)
    if name.endswith(".toml"):
        return ["plan", "--recipe", path]
    return plan_of(ground, path if path.parent == here else path.parent)


def _command_on(command: str, raw: bytes, here: Path) -> Arguments:
    (here / "x").write_bytes(raw)
    return [command, here / "x"]


def _in_run(ground: Ground, name: str, raw: bytes, here: Path) -> Arguments:
    run = ground.copy_of_run(here)
    (run / name).write_bytes(raw)
    return ["build", *ground.job, "-o", run, "--quiet"]
