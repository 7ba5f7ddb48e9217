"""Who teaches: the dense parent, or any other network of timm with the same classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from upvits.calib_data import Preprocess
from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.files import user_path
from upvits.toolchain.networks.config_document import PreprocessEntries
from upvits.toolchain.networks.models import create_model, load, preprocess_of
from upvits.toolchain.networks.names import candidates
from upvits.toolchain.networks.weight_files import State, Weights, as_fp32, read_weights, some
from upvits.toolchain.structure.timm_config import update_config
from upvits.toolchain.training.objective import Outputs, outputs

_PREFIXES = ("", "module.", "model.", "_orig_mod.", "module._orig_mod.")
_AVERAGES = ("state_dict_ema", "model_ema", "ema")
"""Parts of a checkpoint that hold a moving average, which is what was meant to be used."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network and how it wants its images."""

    model: nn.Module
    preprocess: Preprocess


class Taught(nn.Module):
    """What a teacher says of the student's images: at its own size, with its own normalisation."""

    def __init__(self, model: nn.Module, own: Preprocess, given: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.own, self.given = own, given

    def forward(self, images: Tensor) -> Outputs:
        return outputs(self.model, self.view(images))

    def view(self, images: Tensor) -> Tensor:
        """The student's images [B, 3, H, W] as the teacher would have prepared them."""
        if images.shape[-2:] != self.own.input_size[1:]:
            images = F.interpolate(images, self.own.input_size[1:], mode="bicubic", antialias=True)
        if (self.own.mean, self.own.std) == (self.given.mean, self.given.std):
            return images
        given, own = (
            (images.new_tensor(p.mean).view(1, 3, 1, 1), images.new_tensor(p.std).view(1, 3, 1, 1))
            for p in (self.given, self.own)
        )
        return (images * given[1] + given[0] - own[0]) / own[1]


def load_teacher(name: str) -> Teacher:
    """A network of timm, CNNs too, in eval mode on the CPU.

    Args:
        name: a model folder (of this package, or of timm: config.json beside the weights); `NAME=FILE`, timm's name
            and a checkpoint; or a name alone, for timm's pretrained weights from the hub.

    Raises:
        UserError: there is no such network, or the weights are of another one.
        MissingDependencyError: the hub cannot be reached.
    """
    place = user_path(Path(name))
    if place.is_dir():
        return _from_folder(place)
    architecture, equals, file = name.partition("=")
    if not equals and place.is_file():
        raise UserError(
            f"Which network is {name}?",
            why="A file of weights does not say whose they are.",
            fix=f"Give timm's name before it, such as resnet50={name}.",
        )
    if not timm.is_model(architecture.partition(".")[0]) or ":" in architecture:
        raise UserError(
            f"There is no teacher {name!r}.",
            why="It is neither a folder nor a network of timm.",
            fix="Give a model folder, NAME=FILE with timm's name, or a name alone for timm's pretrained weights.",
        )
    if _can_be_pruned(architecture):
        model = create_model(architecture, weights=file or "timm")
        return Teacher(model, preprocess_of(model))
    return _with_file(architecture, user_path(Path(file))) if equals else _from_hub(architecture)


def absolute_teacher(name: str) -> str:
    """The same with an absolute path."""
    architecture, equals, file = name.partition("=")
    if user_path(Path(name)).exists():
        return str(user_path(Path(name)).absolute())
    return f"{architecture}={user_path(Path(file)).absolute()}" if equals else name


def _can_be_pruned(architecture: str) -> bool:
    return architecture.partition(".")[0] in candidates()


def _from_hub(architecture: str) -> Teacher:
    try:
        model = timm.create_model(architecture, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingDependencyError(
            f"The pretrained weights of {architecture} cannot be had here ({str(error).splitlines()[0][:200]}).",
            why="timm downloads them from the Hugging Face hub, which this machine does not reach or does not cache.",
            fix=f"Save its state_dict where there is a network, and give {architecture}=FILE.",
        ) from error
    return _ready(model)


class _Config(BaseModel):
    """Of a config.json in timm's layout, what a teacher needs."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    architecture: str | None = None  # transformers names none of timm's
    num_classes: int | None = None
    model_args: dict[str, Any] = {}
    pretrained_cfg: PreprocessEntries = PreprocessEntries()


def _from_folder(folder: Path) -> Teacher:
    config = read_document(folder / "config.json", _Config, fix="Give a folder that timm or this tool saved.")
    named = config.architecture
    if named is None or not timm.is_model(named) or _can_be_pruned(named):
        model = load(folder)
        return Teacher(model, preprocess_of(model))
    if config.model_args:
        raise UserError(
            f"{folder} was built with arguments: {', '.join(sorted(config.model_args)[:4])}.",
            why="Only the arguments of families that can be pruned are known to be harmless.",
            fix="Take a teacher that timm builds by its name alone.",
        )
    return _with_file(named, folder, config.pretrained_cfg.given)


def _with_file(architecture: str, path: Path, said: Mapping[str, Any] | None = None) -> Teacher:
    """A network that timm builds by its name, with the weights in a file or folder."""
    weights = read_weights(path)
    probe = timm.create_model(architecture, pretrained=False)
    classifier = probe.pretrained_cfg.get("classifier")
    head = f"{classifier if isinstance(classifier, str) else (classifier or ('head',))[0]}.weight"
    state, classes = _fitting(weights, probe, head)
    model = timm.create_model(architecture, pretrained=False, num_classes=classes)
    model.load_state_dict(as_fp32(state, str(path)))
    update_config(model, **dict(said or {}))
    return _ready(model)


def _fitting(weights: Weights, model: nn.Module, head: str) -> tuple[State, int]:
    """The part of a file that is this network's, and its number of classes.

    Raises:
        UserError: none is.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    of_head = head.removesuffix("weight")
    places = sorted(weights.states, key=lambda place: place not in _AVERAGES)
    for place in places:
        for prefix in _PREFIXES:
            found = {n.removeprefix(prefix): t for n, t in weights.states[place].items() if n.startswith(prefix)}
            state = {name: found[name] for name in wanted if name in found}
            same = all(tensor.shape == wanted[name] or name.startswith(of_head) for name, tensor in state.items())
            if state.keys() == wanted.keys() and same:
                return state, len(state[head]) if head in state else int(getattr(model, "num_classes", 0))
    nearest = max((set(wanted) - set(state) for state in weights.states.values()), key=lambda lacks: -len(lacks))
    raise UserError(
        f"{weights.path} holds no weights of this teacher: it lacks {len(nearest)} of {len(wanted)} tensors"
        + (f", such as {some(sorted(nearest))}" if nearest else ", or they have other shapes")
        + ".",
        why="A teacher with random layers would teach noise.",
        fix="Give the name of the network that the file was saved from.",
    )


def _ready(model: nn.Module) -> Teacher:
    config = resolve_model_data_config(model)
    try:
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        checked = PreprocessEntries(**{key: config[key] for key in keys}).given
    except ValidationError as error:
        raise UserError("The teacher's configuration says nothing sensible about its images.") from error
    if (checked["input_size"][0], len(checked["mean"])) != (3, 3):
        raise UserError("The teacher takes no RGB pictures.", fix="Take one for pictures of three channels.")
    return Teacher(model.eval(), Preprocess(**checked))


def require_same_classes(teacher: nn.Module, classes: int, names: tuple[str, ...] | None) -> None:
    """Refuse a teacher of other classes, or of the same in another order.

    Args:
        teacher: the network.
        classes: of the student.
        names: of the student's classes, where they are known.

    Raises:
        UserError: it has others.
    """
    held: Any = getattr(teacher, "num_classes", None)
    if held != classes:
        raise UserError(
            f"The teacher has {held} classes, the network to prune {classes}.",
            why="The student learns to give the teacher's answers, class by class.",
            fix="Take a teacher that was trained on the same classes, or leave `teacher=` out.",
        )
    known = (getattr(teacher, "pretrained_cfg", None) or {}).get("label_names")
    if known is not None and names is not None and tuple(known) != tuple(names):
        place = next(i for i, (one, other) in enumerate(zip(known, names, strict=True)) if one != other)
        raise UserError(
            f"Class {place} of the teacher is {known[place]!r}, that of the network to prune {names[place]!r}.",
            why="The student learns to give the teacher's answers, class by class.",
            fix="Take a teacher that was trained on the same classes in the same order.",
        )
