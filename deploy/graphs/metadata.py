"""What an ONNX file of this tool says beside its graph: names of the classes, and how pictures are prepared."""

from __future__ import annotations

import json
from typing import Annotated

from onnx import ModelProto, TensorProto
from pydantic import BaseModel, ConfigDict, Field

from upvits.calib_data import Preprocess
from upvits.calib_data.documents import parse_document
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.config_document import PreprocessEntries

_AGAIN = "Export the network with `upvits-deploy export` or `upvits.export`: both write it into the file."
_KEYS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
_TEXTS = ("crop_mode", "interpolation")


class _Labels(BaseModel):
    model_config = ConfigDict(frozen=True)

    labels: Annotated[tuple[Annotated[str, Field(max_length=1_000)], ...], Field(max_length=1_000_000)]


def metadata_of(model: ModelProto) -> dict[str, str]:
    """The entries of a file by name."""
    return {entry.key: entry.value for entry in model.metadata_props}


def preprocess_in(model: ModelProto, name: str) -> Preprocess:
    """How pictures are prepared for a network.

    Args:
        model: with one input for images.
        name: of the file, for messages.

    Raises:
        UserError: the file does not say it, says nonsense, or says another size than its input has.
    """
    told = metadata_of(model)
    missing = [key for key in _KEYS if key not in told]
    if missing:
        raise UserError(
            f"{name} does not say how pictures are prepared.",
            why=f"Its metadata has no {', '.join(missing)}; a guess would give other answers than the network has.",
            fix=_AGAIN,
        )
    entries = {key: json.dumps(told[key]) if key in _TEXTS else told[key] for key in _KEYS}
    text = "{" + ", ".join(f'"{key}": {value}' for key, value in entries.items()) + "}"
    found = parse_document(text, f"The metadata of {name}", PreprocessEntries, fix=_AGAIN).given
    empty = sorted(key for key in _KEYS if found[key] is None)
    if empty:
        raise UserError(f"The metadata of {name} has no value for {', '.join(empty)}.", fix=_AGAIN)
    channels, height, width = found["input_size"]
    image = [size.dim_value for value in model.graph.input[:1] for size in value.type.tensor_type.shape.dim][1:]
    expected = [height, width, channels] if takes_pixels(model) else [channels, height, width]
    if channels != 3 or image != expected or {len(found["mean"]), len(found["std"])} != {channels}:
        raise UserError(
            f"{name} is no network for pictures of three channels, or its metadata are of another one.",
            why=f"It says that an image is {channels} x {height} x {width}; its input is {image}.",
            fix=_AGAIN,
        )
    return Preprocess(**{key: found[key] for key in _KEYS})


def labels_in(model: ModelProto, name: str) -> tuple[str, ...] | None:
    """Names of the classes in the order of the outputs; None where the file has none.

    Raises:
        UserError: they are no list of names.
    """
    told = metadata_of(model).get("labels")
    if told is None:
        return None
    return parse_document(f'{{"labels": {told}}}', f"The metadata of {name}", _Labels, fix=_AGAIN).labels


def takes_pixels(model: ModelProto) -> bool:
    """Whether the input is raw pixels instead of normalised ones."""
    return bool(model.graph.input) and model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
