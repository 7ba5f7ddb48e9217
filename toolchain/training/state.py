"""What a killed training needs to go on: one file, written at the end of every epoch.

The file is safetensors: student and projection, their moving average, and AdamW's moments by parameter name. The
counters, the log and the key stand as JSON in its header, so that one atomic rename replaces all of it. Random
numbers need no storing: they are drawn anew from (seed, epoch) when an epoch starts (`seeded`).
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from upvits.calib_data.documents import Count, Name, Number, parse_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.tensors import save_tensors

FORMAT = 1  # raise it when the file's layout changes: older files are then not continued


@dataclass(frozen=True, slots=True)
class EpochLog:
    """One line of log.jsonl. Losses are means over the epoch's images, unweighted; `loss` is their weighted sum."""

    epoch: int  # counted from 1
    lr: float  # of the epoch's last step
    loss: float
    label_loss: float  # cross-entropy, nats
    logit_loss: float  # KL(teacher || student), nats
    feature_loss: float  # mean squared error
    top1: float | None  # of the moving average on the validation images, percent; None: unlabelled or not evaluated
    agreement: float | None  # the same against the teacher's top-1, percent; only where there are no labels
    seconds: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that changes while training. `history` has one entry for each finished epoch."""

    learner: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[EpochLog]


def save_state(path: Path, key: str, state: TrainState) -> None:
    """Writes the checkpoint at `path` (atomically replaced; a checkpoint of other settings stood until now).

    Raises:
        UserError: the folder cannot be written or the disk is full. The former file is then untouched.
    """
    header = {
        "format": FORMAT,
        "key": key,
        "history": [asdict(entry) for entry in state.history],
        "scaler": state.scaler.state_dict(),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(state).items()}
    with _replacing(path) as draft:
        save_tensors(tensors, draft, metadata={"state": json.dumps(header)})


def restore_state(path: Path, key: str, state: TrainState) -> bool:
    """Fills `state` from the checkpoint when there is one with this key; says whether it did.

    A file of other settings, models or data (another key), of another format or a broken one is not continued:
    training starts anew, and its first checkpoint takes that file's place.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_document((file.metadata() or {}).get("state", ""), str(path), _Header, fix="")
            if header.format != FORMAT or header.key != key:
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, UserError):
        return False
    if not _has_shapes_of(state, tensors):
        return False
    _restore_optimizer(state, tensors)
    state.learner.load_state_dict(_part(tensors, "learner."))
    state.ema.load_state_dict(_part(tensors, "ema."))
    if header.scaler:
        state.scaler.load_state_dict(header.scaler)
    state.history[:] = header.history
    return True


@dataclass(frozen=True, slots=True)
class _Header:
    """What stands in the header of the file beside the tensors."""

    format: int
    key: str
    history: list[EpochLog]
    scaler: dict[Name, Number | Count]


def _has_shapes_of(state: TrainState, tensors: dict[str, Tensor]) -> bool:
    """Whether tensors have the names and shapes of the state's; what the optimizer keeps is new in a fresh one."""
    expected = {name: tensor.shape for name, tensor in _tensors(state).items() if not name.startswith("optimizer.")}
    kept = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    return kept == expected


def write_log(path: Path, history: list[EpochLog]) -> None:
    """log.jsonl, whole: the log always says exactly what the checkpoint holds.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    with _replacing(path) as draft:
        draft.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in history), encoding="utf-8")


@contextmanager
def seeded(device: torch.device, *entropy: int) -> Iterator[None]:
    """Python, NumPy and torch draw from `entropy` inside; afterwards they go on as if nothing had been drawn."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"learner.{name}": tensor for name, tensor in state.learner.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for name, parameter in state.learner.named_parameters():
        for slot, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{slot}.{name}"] = value
    return tensors


def _restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in _part(tensors, "optimizer.").items():
        slot, name = key.split(".", 1)
        slots.setdefault(name, {})[slot] = value.clone()  # not a view of the mapped file
    # torch's own numbering: parameters in the order of the groups. Its load_state_dict then moves each tensor to
    # the device that the optimizer wants it on.
    names = {parameter: name for name, parameter in state.learner.named_parameters()}
    document = state.optimizer.state_dict()
    ordered = [names[parameter] for group in state.optimizer.param_groups for parameter in group["params"]]
    document["state"] = {index: slots[name] for index, name in enumerate(ordered) if name in slots}
    state.optimizer.load_state_dict(document)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place at the end, or is removed when writing it failed."""
    draft = path.with_name(path.name + ".tmp")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {path}.",
            why=str(error),
            fix="Free some disk space or choose a folder that you may write; the run then continues where it was.",
        ) from error


def settings_key(*parts: Any) -> str:
    """sha256 of the parts' JSON: equal for runs that do the same from the same start."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
