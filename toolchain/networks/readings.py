"""In which ways the tensors of a file can be read as a network: part of the file, what wrappers put before the names,
layout; and what then fits, what is left over, and what is in the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from upvits.toolchain.networks.layouts import ANCHORS, State, in_timm_names, linear_head, with_heads

_EXTRA = re.compile(
    r"(.*\.)?(mask_token|mask_emb|n_averaged|relative_position_index|total_ops|total_params|logit_scale|logit_bias)$"
    r"|(.*\.)?(decoder\w*|projector|projection_head|predictor|dino_head|ibot_head|pooler|criterion|\w*loss\w*"
    r"|momentum\w*|text|token_embedding|ln_final|positional_embedding|text_projection|transformer|text_model)(\.|$)"
    r"|head\.(mlp|last_layer|projection|predictor)\.|(teacher|student|ema|model_ema)\."
    r"|visual\.(head|proj)\b"
)
"""Tensors beside a network that a known pretraining, a text tower or a counter leaves in files."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a file.

    Attributes:
        place: the part of the file, such as `state_dict_ema`; empty for the file itself.
        prefix: what stands before every name, such as `module.`.
        layout: whose names they are; a value of `ANCHORS`.
        state: the tensors of the network under timm's names.
        outside: tensors of the same part that are not below the prefix, under their own names.
        head: where the classifier had another name: that name.
    """

    place: str
    prefix: str
    layout: str
    state: State
    outside: State
    head: str = ""

    @property
    def title(self) -> str:
        """What a user would call it."""
        parts = [repr(self.place) if self.place else "", f"names after {self.prefix!r}" if self.prefix else ""]
        return ", ".join(part for part in parts if part) or "the file itself"

    @property
    def num_classes(self) -> int:
        """Rows of the classifier; 0 without one."""
        head = self.state.get("head.weight")
        return len(head) if head is not None and head.ndim == 2 else 0


@dataclass(frozen=True, slots=True)
class Fit:
    """How the tensors of a reading compare with a network's.

    Attributes:
        state: those that the network needs, and that are there.
        left_out: known extras, under the names of the file.
        missing: names that the network needs.
        unknown: names that it does not know.
        shapes: sentences about tensors of another shape.
    """

    state: State
    left_out: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    shapes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every tensor of the network is there, and nothing else that could matter."""
        return not (self.missing or self.unknown or self.shapes)


def readings(states: Mapping[str, State], model: nn.Module) -> Iterator[Reading]:
    """Every way to find a network like `model` in a file; none fits for certain.

    Args:
        states: the parts of the file.
        model: a network of the architecture; only its structure matters.
    """
    for place, state in states.items():
        for anchor, layout in ANCHORS.items():
            for name in state:
                if name == anchor or name.endswith(f".{anchor}"):
                    yield _reading(place, name.removesuffix(anchor), layout, state, model)


def _reading(place: str, prefix: str, layout: str, tensors: State, model: nn.Module) -> Reading:
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    if layout == "OpenCLIP":  # timm's filter takes what is below `visual.`, and drops the rest
        outside |= {name: tensor for name, tensor in below.items() if not name.startswith("visual.")}
    state = in_timm_names(below, layout, model)
    state, outside = with_heads(state, outside, layout)
    head = ""
    weight = state.get("norm.weight", state.get("fc_norm.weight", state.get("stages.3.norm.weight")))
    if "head.weight" not in state and weight is not None:
        head = linear_head(state, outside, len(weight)) or ""
        for kind in ("weight", "bias") if head else ():
            for part in (state, outside):
                if f"{head}.{kind}" in part:
                    state[f"head.{kind}"] = part.pop(f"{head}.{kind}")
    return Reading(place, prefix, layout, state, outside, head)


def fitted(reading: Reading, model: nn.Module) -> Fit:
    """The tensors of a reading beside those of a network."""
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: State = {}
    unknown: list[str] = []
    left_out: list[str] = []
    shapes: list[str] = []
    for name, tensor in reading.state.items():
        if name not in needed:
            (left_out if _is_extra(name) else unknown).append(f"{reading.prefix}{name}")
        elif tuple(tensor.shape) != needed[name]:
            shapes.append(f"{name} is {tuple(tensor.shape)} instead of {needed[name]}")
        else:
            state[name] = tensor
    for name in reading.outside:
        (left_out if _is_extra(name) or _is_other_network(name) else unknown).append(name)
    missing = tuple(name for name in needed if name not in reading.state)
    return Fit(state, tuple(left_out), missing, tuple(unknown), tuple(shapes))


def _is_extra(name: str) -> bool:
    return _EXTRA.match(name) is not None


def _is_other_network(name: str) -> bool:
    return re.match(r"(module\.)?(teacher|student|ema|momentum)\w*\.", name) is not None


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states hold equal values under equal names."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and bool((one[name] == other[name]).all()) for name in one
    )


def preferred(fits: Sequence[Reading]) -> Reading | None:
    """The one of several readings that a training script means to be used: an average of weights before the weights
    that it was made of, a teacher that is one before its student. None where that cannot be told."""
    words = [re.split(r"[/._]", f"{reading.place}/{reading.prefix}".lower()) for reading in fits]
    for better, worse in (("ema", None), ("teacher", "student")):
        with_word = [reading for reading, parts in zip(fits, words, strict=True) if better in parts]
        others = [parts for parts in words if better not in parts]
        if len(with_word) == 1 and (worse is None or all(worse in parts for parts in others)):
            return with_word[0]
    return None
