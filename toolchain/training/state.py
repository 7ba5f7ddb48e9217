"""What a killed training needs to go on: one file, written at the end of every epoch and now and then within one.

The file is safetensors: student and projection, their moving average, and AdamW's moments by parameter name. The
counters, the log and what is trained stand as JSON in its header, so that one atomic rename replaces all of it. Random
numbers need no storing: they are drawn anew from (seed, epoch, step) in every step (`seeded`).
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from upvits.calib_data.documents import Count, Name, Number, Text, parse_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.tensors import save_tensors
from upvits.toolchain.processes.process import shared
from upvits.toolchain.training.objective import LOSSES

_LOGGER = logging.getLogger(__name__)

FORMAT = 4  # raise it when the file's layout changes: older files are then not continued

COLUMNS = len(LOSSES) + 1
"""Sums of an epoch: each part of the loss, and the number of images."""


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
    hard_loss: float = 0.0  # cross-entropy against the teacher's first class, nats
    map_loss: float = 0.0  # mean squared error of normalised tokens


@dataclass(slots=True)
class TrainState:
    """All that changes while training.

    Attributes:
        history: one entry for each finished epoch.
        sums: [COLUMNS], the parts of the loss over the images of this process in the unfinished epoch, and how many.
        step: steps of the unfinished epoch that are done.
        all_sums: `sums` of every process when they were last put together, for a checkpoint.
    """

    learner: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[EpochLog]
    sums: Tensor
    step: int = 0
    all_sums: list[list[float]] = field(default_factory=list)

    def begin_epoch(self) -> None:
        """The epoch before is finished."""
        self.step, self.sums, self.all_sums = 0, torch.zeros_like(self.sums), []


def save_state(path: Path, about: Mapping[str, str], state: TrainState) -> None:
    """Writes the checkpoint at `path` (atomically replaced), with what `restore_state` asks for.

    Raises:
        UserError: the folder cannot be written or the disk is full. The former file is then untouched.
    """
    header = {
        "format": FORMAT,
        "about": dict(about),
        "history": [asdict(entry) for entry in state.history],
        "step": state.step,
        "sums": state.all_sums,
        "scaler": state.scaler.state_dict(),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(state).items()}
    with _replacing(path) as draft:
        save_tensors(tensors, draft, metadata={"state": json.dumps(header)})


def best_epoch(history: Sequence[EpochLog]) -> EpochLog | None:
    """The epoch whose moving average is best on the validation images, or agrees best with the teacher where they have
    no labels. Of equal ones the last counts: a few images cannot tell them apart. None where none was evaluated."""
    judged = [entry for entry in history if _accuracy(entry) is not None]
    return max(judged, key=lambda entry: (_accuracy(entry), entry.epoch), default=None)


def _accuracy(entry: EpochLog) -> float | None:
    return entry.agreement if entry.top1 is None else entry.top1


def keep_best(path: Path, state: TrainState) -> None:
    """Writes the moving average, timm's names, where the epoch that has just ended is the best one so far.

    Called after its checkpoint, and again by a training that goes on from there: it may have been killed in between.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    best = best_epoch(state.history)
    if best is None:
        path.unlink(missing_ok=True)  # of another training
    elif best is state.history[-1] and state.step == 0:
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.ema.state_dict().items()}
        with _replacing(path) as draft:
            save_tensors(tensors, draft, metadata={"epoch": str(best.epoch), "accuracy": f"{_accuracy(best):.3f}"})


def restore_state(path: Path | None, about: Mapping[str, str], state: TrainState) -> bool:
    """Fills `state` from the checkpoint when there is one; says whether it did.

    Of several processes the first one reads it, and all get what it holds. In place of a file of another format or a
    broken one, training starts anew, and its first checkpoint takes that file's place.

    Args:
        path: None where there is none, and in all processes but the first one.
        about: what decides the result of the training, by name: settings, and digests of what is trained on what.

    Raises:
        UserError: it is the checkpoint of another training; says in what they differ.
    """
    process, tensors = shared(), dict[str, Tensor]()

    def read() -> tuple[_Header, dict[str, tuple[torch.Size, torch.dtype]]] | None:
        found = None if path is None else _read(path, about, state)
        if found is None:
            return None
        tensors.update(found[1])
        return found[0], _shapes(found[1])

    found = process.from_leader(read)
    if found is None:
        return False
    header, shapes = found
    for name, (shape, kind) in shapes.items():
        if name not in tensors:
            tensors[name] = torch.empty(shape, dtype=kind)
        process.same(tensors[name])
    _restore_optimizer(state, tensors)
    state.learner.load_state_dict(_part(tensors, "learner."))
    state.ema.load_state_dict(_part(tensors, "ema."))
    if header.scaler:
        state.scaler.load_state_dict(header.scaler)
    state.history[:] = header.history
    state.step = header.step
    if len(header.sums) not in (0, process.world_size):
        _LOGGER.info("%d processes continue what %d began.", process.world_size, len(header.sums))
    state.sums = torch.tensor(_own_sums(header.sums, process.rank, process.world_size)).to(state.sums)
    return True


def _own_sums(sums: list[list[float]], rank: int, processes: int) -> list[float]:
    """This process's part of the sums; the first of another number of processes takes all of them."""
    if len(sums) == processes:
        return sums[rank]
    whole = [sum(column) for column in zip(*sums, strict=True)] or [0.0] * COLUMNS
    return whole if rank == 0 else [0.0] * COLUMNS


def _read(path: Path, about: Mapping[str, str], state: TrainState) -> tuple[_Header, dict[str, Tensor]] | None:
    """Header and tensors of a checkpoint that can be continued."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_document((file.metadata() or {}).get("state", ""), str(path), _Header, fix="")
            if header.format != FORMAT or any(len(sums) != COLUMNS for sums in header.sums):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, UserError):
        return None
    if header.about != about:
        raise UserError(
            f"{path} is the checkpoint of another training: {_differences(header.about, about)}.",
            why="A training that starts anew there would take its place, and what was learned would be lost.",
            fix="Repeat the call of that training, or choose another folder.",
        )
    return (header, tensors) if _has_shapes_of(state, tensors) else None


def _differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """In words, with the values where they are short."""
    told = []
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name, "nothing"), here.get(name, "nothing")
        if one != other:
            short = max(len(one), len(other)) < 40  # no digest
            told.append(f"{name} was {one} and is {other}" if short else f"another {name}")
    return ", ".join(told)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class _Header:
    """What stands in the header of the file beside the tensors."""

    format: int
    about: dict[Name, Text]
    history: list[EpochLog]
    scaler: dict[Name, Number | Count]
    step: Count
    sums: list[list[Number]]


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
