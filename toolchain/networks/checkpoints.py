"""A network from the weights in a file: which reading of the tensors fits, and what follows from it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.building import build
from upvits.toolchain.networks.explain import ambiguous, does_not_fit, doubtful_activation
from upvits.toolchain.networks.found import Found, set_found
from upvits.toolchain.networks.readings import Fit, Reading, fitted, preferred, readings, same_tensors
from upvits.toolchain.networks.said import ARGUMENTS, Said, said_in
from upvits.toolchain.networks.settle import (
    SQUARE,
    Size,
    Wanted,
    assumed,
    other_sizes,
    pooling,
    positioned_prefix,
    prepare,
    said_arguments,
    size_of_weights,
    untold,
)
from upvits.toolchain.networks.weight_files import State, Weights, as_fp32, read_weights, some
from upvits.toolchain.structure.layers import adopt_parameters
from upvits.toolchain.structure.meta import on_meta
from upvits.toolchain.structure.timm_config import update_config

_LOGGER = logging.getLogger(__name__)


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names, types, shapes and values of a network's tensors; tells whose scores or plan it is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A reading of a file with the network that it is compared with (on the meta device), and how it fits.

    Attributes:
        arguments: timm's, for building that network.
        size: height and width of the images that the weights are for.
        source: where the size is known from.
    """

    reading: Reading
    model: nn.Module
    fit: Fit
    arguments: Mapping[str, Any]
    size: Size
    source: str


def network_from_file(architecture: str, path: Path, wanted: Wanted) -> nn.Module:
    """The network of an architecture with the weights in a file, an index of shards, or a folder without config.json.

    Raises:
        UserError: the weights are unreadable, fit in no way or in several, or hold NaN; says what they look like.
    """
    weights = read_weights(path)
    said = said_in(weights.beside)
    chosen, notes = choose(architecture, weights, candidates(architecture, weights, said, wanted), said)
    doubts: dict[str, tuple[str, ...]] = {}
    # a training that names its arguments has said all that is not the default, and other layouts have one form only
    if said.architecture is None and chosen.reading.layout == "timm":
        doubts = untold(chosen.arguments, chosen.reading.state, chosen.model)
    if chosen.reading.layout == "OpenCLIP" and "act_layer" not in chosen.arguments and "quickgelu" not in architecture:
        raise doubtful_activation(architecture, path)
    if wanted.num_classes is not None and chosen.reading.num_classes != wanted.num_classes:
        raise UserError(
            f"{path} has {chosen.reading.num_classes} classes, but {wanted.num_classes} are wanted.",
            why="Accuracy would be measured against the wrong labels.",
            fix="Fine-tune the network on these classes first, or give the data that it was trained on.",
        )
    state = as_fp32(chosen.fit.state, str(path))
    model = chosen.model
    source = chosen.source
    if wanted.image_size is not None and wanted.image_size != chosen.size:
        model, state = _at_other_size(architecture, chosen, state, wanted.image_size)
        source = "the options"
    model = adopt_parameters(model, state)
    sources = prepare(model, architecture, said, wanted, ARGUMENTS)
    if said.labels is not None and len(said.labels) == chosen.reading.num_classes:
        update_config(model, label_names=said.labels)
        notes = (*notes, f"Names of {len(said.labels)} classes are in the file.")
    others = other_sizes(model) if source == SQUARE else ()
    set_found(
        model, Found((*notes, *assumed(doubts)), {"input_size": source, **sources}, said.accuracy, doubts, others)
    )
    return model


def choose(
    architecture: str, weights: Weights, tried: Sequence[Candidate], said: Said
) -> tuple[Candidate, tuple[str, ...]]:
    """The one reading of a file that fits an architecture, and what is to be said about it.

    Raises:
        UserError: none fits, or several do.
    """
    fitting = [candidate for candidate in tried if candidate.fit.exact]
    if not fitting:
        raise does_not_fit(architecture, weights, [(one.reading, one.fit) for one in tried])
    first, others = fitting[0], fitting[1:]
    rivals = [one for one in others if not same_tensors(one.reading.state, first.reading.state)]
    if rivals:
        best = preferred([one.reading for one in fitting])
        if best is None:
            raise ambiguous(weights.path, [one.reading for one in (first, *rivals)])
        first = next(one for one in fitting if one.reading is best)
    return first, _notes(first, fitting, architecture, said)


def candidates(architecture: str, weights: Weights, said: Said, wanted: Wanted) -> list[Candidate]:
    """Every reading of a file as a network of this architecture, fitting or not.

    Raises:
        UserError: nothing tells the size of the images, or arguments contradict each other.
    """
    told = {} if said.architecture is None else said_arguments(architecture, said)
    with on_meta():
        probe = build(architecture, **{**told, **wanted.model_args})
    found = list(readings(weights.states, probe))
    with on_meta():
        return [_candidate(architecture, reading, weights.path, said, wanted, told) for reading in found]


def _candidate(
    architecture: str, reading: Reading, path: Path, said: Said, wanted: Wanted, told: Mapping[str, Any]
) -> Candidate:
    weight = reading.state["patch_embed.proj.weight"]
    channels = {} if weight.ndim != 4 or weight.shape[1] == 3 else {"in_chans": int(weight.shape[1])}
    arguments = {**told, **channels, **wanted.model_args}
    probe = build(architecture, num_classes=reading.num_classes, **arguments)
    arguments |= pooling(arguments, reading.state, probe)
    size, source = size_of_weights(reading, probe, architecture, said, wanted, path)
    model = build(architecture, num_classes=reading.num_classes, image_size=size, **arguments)
    return Candidate(reading, model, fitted(reading, model), arguments, size, source)


def _at_other_size(architecture: str, chosen: Candidate, state: State, size: Size) -> tuple[nn.Module, State]:
    """The network for images of another size, its position embedding resampled (bicubic, as timm does)."""
    with on_meta():
        model = build(architecture, num_classes=chosen.reading.num_classes, image_size=size, **chosen.arguments)
    return model, resample_position_embedding(state, chosen.model, model)


def resample_position_embedding(state: State, old: nn.Module, new: nn.Module) -> State:
    """The weights of `old` with a position embedding for the image size of `new` (bicubic, as timm does)."""
    if "pos_embed" not in state:
        return state
    embeddings: list[Any] = [network.get_submodule("patch_embed") for network in (old, new)]
    grids = [list(embedding.grid_size) for embedding in embeddings]
    if grids[0] == grids[1]:
        return state
    position: Tensor = resample_abs_pos_embed(
        state["pos_embed"], new_size=grids[1], old_size=grids[0], num_prefix_tokens=positioned_prefix(old)
    )
    return {**state, "pos_embed": position}


def _notes(chosen: Candidate, fitting: list[Candidate], architecture: str, said: Said) -> tuple[str, ...]:
    reading, notes = chosen.reading, []
    if reading.place or reading.prefix or reading.layout != "timm":
        naming = "" if reading.layout == "timm" else f", in the naming of {reading.layout}"
        whole = "" if reading.place or reading.prefix else "the file itself"
        notes.append(f"The weights are {whole or f'{reading.title} of the file'}{naming}.")
    unused = sorted({one.reading.title for one in fitting} - {reading.title})
    if unused:
        notes.append(f"The file also holds {some(unused)}, which is not used.")
    if reading.head:
        notes.append(f"The classifier is {reading.head!r} of the file.")
    if chosen.fit.left_out:
        notes.append(f"{len(chosen.fit.left_out)} tensors are left out: {some(list(chosen.fit.left_out))}.")
    if said.architecture is not None and said.architecture.partition(".")[0] != architecture.partition(".")[0]:
        notes.append(f"The checkpoint says that it is a {said.architecture}.")
    arguments = {name: value for name, value in chosen.arguments.items() if name != "in_chans"}
    if arguments:
        spelled = ", ".join(f"{name}={value}" for name, value in sorted(arguments.items()))
        notes.append(f"Built with {spelled}.")
    for note in notes:
        _LOGGER.info("%s", note)
    return tuple(notes)
