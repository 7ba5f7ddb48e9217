"""Weights on disk, as people have them: a file, an index of shards, or a folder with one of the two.

What is read are tensors under the names of the file, in one dictionary for every part of the file that holds some
(`""` the file itself, `state_dict_ema`, `teacher/backbone`), and what the file says beside them. No file runs code.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.paths import RelativePath
from upvits.calib_data.printable import printable
from upvits.toolchain.networks.pickles import Array, Record, foreign_names, name_of, read_pickle

State = dict[str, Tensor]

IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Files with weights in model folders; the first that is there is read."""

_SKIPPED = ("optimizer", "scheduler", "scaler", "callbacks", "loops", "rng", "loss_scaler")
"""Parts of training checkpoints that hold tensors but no weights, by the start of their names."""

_DEEPEST = 6
_REPEATED = 1 << 24
"""Bytes of a tensor that may repeat what is stored, as `expand` makes it."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a file holds.

    Attributes:
        path: as it was named.
        states: tensors by name, for every part of the file that holds some.
        beside: everything else at the file's top, as it was read; not yet checked.
    """

    path: Path
    states: Mapping[str, State]
    beside: Mapping[str, object]


class _Index(BaseModel):
    """Which shard holds which tensor, as transformers writes it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    weight_map: Annotated[dict[str, RelativePath], Field(min_length=1, max_length=1_000_000)]


def read_weights(path: Path) -> Weights:
    """The weights in a file, an index or a folder.

    Raises:
        UserError: nothing is there, it is damaged or incomplete, or it is something else; says what it looks like.
    """
    file = weights_in_folder(path) if path.is_dir() else path
    if not file.exists():
        raise UserError(
            f"There is no checkpoint file {file}.", fix="Give a .safetensors, .pth or .pt file, or a folder."
        )
    require_regular(file, fix="Give a .safetensors, .pth or .pt file, an index of shards, or a model folder.")
    if file.suffix == ".json":
        return Weights(path, {"": _sharded(file)}, {})
    states, beside = _read(file)
    if not states:
        raise UserError(f"{path} holds no tensors.", fix="Expected is a state dict in safetensors or torch format.")
    return Weights(path, states, beside)


def weights_in_folder(folder: Path) -> Path:
    """The file or index with the weights of a model folder.

    Raises:
        UserError: there is none.
    """
    for name in IN_FOLDER:
        if (folder / name).exists():
            return folder / name
    if (folder / "adapter_config.json").exists():
        raise lora(folder)
    raise UserError(
        f"{folder} holds no weights.",
        why=f"Looked for were {', '.join(IN_FOLDER)}.",
        fix="Give the folder that they are in, or the file itself.",
    )


def _sharded(index: Path) -> State:
    shards = sorted(
        set(read_document(index, _Index, fix="Give the index that was saved with the shards.").weight_map.values())
    )
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index} names {len(shards)} shards, of which {len(missing)} are not there: {some(missing)}.",
            why="A network lacks the tensors of every shard that is missing.",
            fix=f"Put them beside the index, in {index.parent}.",
        )
    state: State = {}
    for name in shards:
        states, _ = _read(index.parent / name)
        state |= states.get("", {})
    return state


def _read(path: Path) -> tuple[dict[str, State], dict[str, object]]:
    _refuse_other_kinds(path)
    try:
        if _is_safetensors(path):
            with safe_open(path, "pt") as file:
                said: dict[str, object] = dict(file.metadata() or {})
            return {"": load_file(path)}, said
        content = read_pickle(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    states = {place: state for place, state in _states(content, "", 0, set()) if state}
    _require_stored(path, states)
    beside = {name_of(name): value for name, value in content.items()} if isinstance(content, Mapping) else {}
    return states, {name: value for name, value in beside.items() if not isinstance(value, Tensor)}


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _require_stored(path: Path, states: Mapping[str, State]) -> None:
    """Refuse tensors that are no plain numbers in the file: a few bytes can stand for terabytes.

    Raises:
        UserError: names one.
    """
    for state in states.values():
        for name, tensor in state.items():
            dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
            if not dense or tensor.is_meta or tensor.nbytes > max(tensor.untyped_storage().nbytes(), _REPEATED):
                raise UserError(
                    f"{path} holds a tensor that is sparse, quantized, or larger than what is stored: {some([name])}.",
                    why="Weights are read as plain numbers.",
                    fix="Where they come from, save `tensor.dequantize().to_dense().contiguous()` of each.",
                )


def _states(content: object, place: str, depth: int, seen: set[int]) -> Iterator[tuple[str, State]]:
    """Every dictionary that holds tensors, once each, by the names on the way to it.

    Dictionaries may hold one another many times or themselves; walked each time, six levels would never end.
    """
    entries = vars(content) if isinstance(content, Record) else content
    if not isinstance(entries, Mapping) or depth > _DEEPEST or id(entries) in seen:
        return
    seen.add(id(entries))
    found: State = {}
    for key, value in entries.items():
        name = name_of(key)
        tensor = value.tensor if isinstance(value, Array) else value
        if isinstance(tensor, Tensor):
            found[name] = tensor.detach()
        elif not name.startswith(_SKIPPED):
            yield from _states(value, f"{place}/{name}" if place else name, depth + 1, seen)
    yield place, found


def _refuse_other_kinds(path: Path) -> None:
    """Files that are often taken for weights.

    Raises:
        UserError: it is one; says what it looks like.
    """
    with path.open("rb") as file:
        start = file.read(64)
    looks, fix = "", ""
    if not start:
        looks, fix = "an empty file", "Was it copied while it was written, or is the disk full? Get it again."
    elif start.startswith(b"version https://git-lfs"):
        looks, fix = "a Git LFS pointer, not the file that it stands for", "Run `git lfs pull` where it was cloned."
    elif start.startswith(b"GGUF"):
        looks, fix = "GGUF, the format of llama.cpp", "Give the weights that it was made from."
    elif start.startswith(b"\x89HDF"):
        looks, fix = "HDF5, the format of Keras", "Give weights of timm or transformers."
    elif path.suffix == ".onnx" or (start[:1] == b"\x08" and b"pytorch" in start):
        looks = "an ONNX graph"
        fix = "A graph cannot be trained: give the checkpoint that it was exported from."
    elif start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")):
        looks, fix = "a picture", "Give a checkpoint; `upvits-deploy predict` takes pictures beside a network."
    elif start.lstrip()[:1] == b"<":
        looks, fix = "a web page or XML", "The download gave a page instead of the file: get it again."
    elif start.startswith(b"PK"):
        looks, fix = _kind_of_archive(path)
    if looks:
        raise UserError(f"{path} looks like {looks}, and holds no weights that can be read.", fix=fix)


def _kind_of_archive(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a torch file that was cut short", "Was it copied whole? Get it again."
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        return "TorchScript, a compiled network", (
            "Save its tensors where it came from: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')."
        )
    if names and all(name.endswith(".npy") for name in names):
        return "a numpy archive (JAX weights)", (
            "Load it with timm (`timm.create_model(NAME, checkpoint_path=FILE)`) and save its state_dict."
        )
    return "", ""


def _unreadable(path: Path, error: Exception) -> UserError:
    foreign = [] if _is_safetensors(path) else foreign_names(path)
    if any(name.startswith("torch.nn.modules") for name in foreign):
        return UserError(
            f"{path} holds a whole pickled network ({_class_of(foreign)}), more than tensors, and is not loaded.",
            why="Such a pickle can run code on your machine when it is opened.",
            fix="In the environment that made it: "
            "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pth'), and give that file.",
        )
    if foreign or "weights_only" in str(error) or "Weights only" in str(error):
        return UserError(
            f"{path} holds more than tensors{f' ({some(foreign)})' if foreign else ''}, and is not loaded.",
            why="Such a pickle can run code on your machine when it is opened.",
            fix="In the environment that made it, save `model.state_dict()` with safetensors.torch.save_file.",
        )
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return UserError(
        f"{path} cannot be read as a checkpoint ({reason}).",
        fix="Is the file complete? Expected is a state dict in safetensors or torch format.",
    )


def _class_of(names: list[str]) -> str:
    """The class of a pickled network: the one that is no layer of torch or timm."""
    networks = [name for name in names if not name.startswith(("torch.", "timm.layers"))]
    models = [name for name in networks if name.startswith("timm.models.") and not name.endswith(("Block", "Stage"))]
    return (models or networks or names)[0].rpartition(".")[2][:100]


def lora(path: Path) -> UserError:
    """The message for a LoRA adapter."""
    return UserError(
        f"{path} looks like a LoRA adapter: it holds changes to a network, not the network.",
        fix="Merge it where it was trained (peft: model.merge_and_unload()), save the whole network and give that.",
    )


def as_fp32(state: Mapping[str, Tensor], source: str) -> State:
    """Floating-point tensors as fp32; NaN and infinity are refused.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    result = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    broken = [name for name, value in result.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{source} holds NaN or infinite values in {some(broken)}.",
            why="Nothing that is computed from them would mean anything.",
            fix="Use an earlier checkpoint of that training.",
        )
    return result


def some(items: list[str], count: int = 4) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return printable(", ".join(items[:count]), 400) + more
