"""What an ONNX file of this tool says beside its graph: names of the classes, and how pictures are prepared."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, TensorProto
from pydantic import ValidationError

from upvits.calib_data import Preprocess
from upvits.calib_data.documents import Name, parse_document, parse_json
from upvits.calib_data.errors import UserError
from upvits.calib_data.printable import printable
from upvits.toolchain.networks.config_document import PreprocessEntries

_AGAIN = "Export the network with `upvits-deploy export` or `upvits.export`: both write it into the file."
_KEYS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
_TEXTS = ("crop_mode", "interpolation")


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
    found = preprocess_said(metadata_of(model), name)
    channels, height, width = found.input_size
    image = [size.dim_value for value in model.graph.input[:1] for size in value.type.tensor_type.shape.dim][1:]
    expected = [height, width, channels] if takes_pixels(model) else [channels, height, width]
    if channels != 3 or image != expected or {len(found.mean), len(found.std)} != {channels}:
        raise UserError(
            f"{name} is no network for pictures of three channels, or its metadata are of another one.",
            why=f"It says that an image is {channels} x {height} x {width}; its input is {image}.",
            fix=_AGAIN,
        )
    return found


def preprocess_said(told: Mapping[str, str], name: str) -> Preprocess:
    """How pictures are prepared, from the metadata of the file `name`; raises like `preprocess_in`."""
    missing = [key for key in _KEYS if key not in told]
    if missing:
        raise UserError(
            f"{name} does not say how pictures are prepared.",
            why=f"Its metadata has no {', '.join(missing)}; a guess would give other answers than the network has.",
            fix=_AGAIN,
        )
    where = f"The metadata of {name}"
    entries = {key: told[key] if key in _TEXTS else parse_json(told[key], where, fix=_AGAIN) for key in _KEYS}
    try:
        found = PreprocessEntries.model_validate(entries).given
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        wrong = printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 300)
        raise UserError(f"{where} is not valid.", why=f"{wrong}.", fix=_AGAIN) from error
    empty = sorted(key for key in _KEYS if found[key] is None)
    if empty:
        raise UserError(f"{where} has no value for {', '.join(empty)}.", fix=_AGAIN)
    return Preprocess(**{key: found[key] for key in _KEYS})


def labels_in(model: ModelProto, name: str) -> tuple[str, ...] | None:
    """Names of the classes in the order of the outputs; None where the file has none.

    Raises:
        UserError: they are no list of names.
    """
    return labels_said(metadata_of(model), name)


def labels_said(told: Mapping[str, str], name: str) -> tuple[str, ...] | None:
    """Names of the classes, from the metadata of the file `name`; raises like `labels_in`."""
    if "labels" not in told:
        return None
    return parse_document(told["labels"], f"labels in the metadata of {name}", tuple[Name, ...], fix=_AGAIN)


def takes_pixels(model: ModelProto) -> bool:
    """Whether the input is raw pixels instead of normalised ones."""
    return bool(model.graph.input) and model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
