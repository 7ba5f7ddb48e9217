"""A trained detector as a folder: structure in JSON, weights in safetensors, nothing pickled.

detector.json        what mmdet builds it from; the backbone's structure is part of it
model.safetensors    all weights, in mmdet's names
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from upvits.calib_data import Preprocess
from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.paths import share
from upvits.calib_data.printable import printable
from upvits.calib_data.tensors import save_tensors
from upvits.detection import openmm
from upvits.detection.backbone import UPPVTv2
from upvits.detection.config_check import check_detector_config
from upvits.detection.configs import Side
from upvits.detection.simple_pyramid import UPViT
from upvits.toolchain.networks.models import structure_of

FORMAT = 1
_SMALL = 64  # pixels
_STRUCTURE, _WEIGHTS = "detector.json", "model.safetensors"
_EXPECTED = f"Expected are {_STRUCTURE} and {_WEIGHTS}, as `upvits-deploy detect train` writes them."


@dataclass(frozen=True, slots=True)
class DetectorInfo:
    """A detector without its weights.

    Attributes:
        config: of the model, as mmdet builds it.
        classes: in the order of labels.
        category_ids: of the classes in the data set that it was trained on.
        scale: images were scaled to fit (long side, short side) in pixels.
    """

    config: dict[str, Any]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    scale: tuple[int, int]

    @property
    def has_masks(self) -> bool:
        """Whether the detector finds masks beside boxes; such a detector has no fixed graph, and is not exported."""
        return bool(self.config["type"] == "MaskRCNN")

    def preprocess(self, size: tuple[int, int]) -> Preprocess:
        """How images are made ready for the detector, fitted into `size` (height, width) in pixels."""
        statistics = self.config["data_preprocessor"]  # mmdet counts pixels from 0 to 255
        mean, std = ((r / 255, g / 255, b / 255) for r, g, b in (statistics["mean"], statistics["std"]))
        return Preprocess((3, *size), mean, std, "bilinear", 1.0, "border")


def save_detector(detector: nn.Module, info: DetectorInfo, folder: Path) -> None:
    """Write a detector as a folder that is whole or not there.

    Raises:
        UserError: the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already.", fix="Give a new folder; nothing is overwritten.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        share(draft)
        save_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()},
            draft / _WEIGHTS,
        )
        config = {**info.config, "backbone": _self_contained(detector, info.config["backbone"])}
        (draft / _STRUCTURE).write_text(
            json.dumps({"format": FORMAT, **asdict(info), "config": config}, indent=2) + "\n"
        )
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _self_contained(detector: nn.Module, backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's configuration, with its structure in place of the folder that it was built from."""
    module = detector.get_submodule("backbone")
    if not isinstance(module, (UPPVTv2, UPViT)):
        return dict(backbone)
    return {**backbone, "model": structure_of(module.get_submodule("net"))}


class DetectorDocument(BaseModel):
    """`detector.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1] = 1
    config: dict[str, JsonValue]
    classes: Annotated[tuple[Annotated[str, Field(max_length=1_000)], ...], Field(max_length=100_000)]
    category_ids: Annotated[tuple[int, ...], Field(max_length=100_000)]
    scale: tuple[Side, Side]


def read_info(folder: Path) -> DetectorInfo:
    """The detector in a folder without its weights.

    Raises:
        UserError: the folder holds no detector, or one that is more than data.
    """
    path = folder / _STRUCTURE
    if not path.exists():
        raise _no_detector(folder, f"there is no {_STRUCTURE}")
    document = read_document(path, DetectorDocument, fix=_EXPECTED)
    check_detector_config(document.config, str(path))
    return DetectorInfo(dict(document.config), document.classes, document.category_ids, document.scale)


def _no_detector(folder: Path, why: object) -> UserError:
    return UserError(f"{folder} holds no detector ({why}).", fix=_EXPECTED)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the detector in a folder.

    Raises:
        UserError: there are none.
    """
    require_regular(folder / _WEIGHTS, fix=_EXPECTED)
    try:
        return load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _no_detector(folder, error) from error


def load_detector(folder: Path) -> tuple[nn.Module, DetectorInfo]:
    """The detector in a folder, in eval mode on the CPU.

    Raises:
        UserError: the folder holds no detector, or its weights are of another one.
        MissingDependencyError: mmdet is not installed.
    """
    info = read_info(folder)
    state = read_weights(folder)
    with _of_our_parts(folder):
        shapes = openmm.shapes_of(info.config)  # before anything fills memory
    saved = {name: tensor.shape for name, tensor in state.items()}
    if shapes != saved:
        differing = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
        raise UserError(
            f"The weights in {folder} are of another detector: {', '.join(map(printable, differing[:3]))} differ.",
            fix="Use a folder as it was written.",
        )
    with _of_our_parts(folder):
        detector = openmm.build_detector(info.config)
        detector.load_state_dict(state)
        with torch.inference_mode():
            openmm.predict(detector, torch.zeros(1, 3, _SMALL, _SMALL))  # parts may fit and still not work together
    return detector.eval(), info


@contextmanager
def _of_our_parts(folder: Path) -> Iterator[None]:
    """Whatever mmdet says of parts that it knows and values that do not fit them, as one message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = f"mmdet cannot build or run it: {type(error).__name__}: {printable(str(error), 300)}"
        raise _no_detector(folder, why) from error
