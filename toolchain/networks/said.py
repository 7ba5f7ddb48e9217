"""What a checkpoint says about itself beside its tensors: how it was trained, on which classes, how well.

Nothing of it is trusted: every entry is checked by itself, and one that is not what its name promises is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import timm
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from upvits.toolchain.networks.config_document import PreprocessEntries
from upvits.toolchain.networks.pickles import Record, name_of

_LOGGER = logging.getLogger(__name__)

_LABELS = ("label_names", "class_names", "classes", "CLASSES", "labels", "class_to_idx", "idx_to_class", "id2label")
_ACCURACIES = (
    "metric", "best_metric", "best_acc1", "best_acc", "best_top1", "max_accuracy", "test_acc1", "val_acc1", "val_acc",
    "acc1", "acc", "top1", "accuracy",
)  # fmt: skip
_PARTS = ("args", "hyper_parameters", "hparams", "config", "cfg", "meta", "dataset_meta")
"""Where training scripts keep settings."""

_DEEPEST = 2

ARGUMENTS = "the checkpoint's arguments"


class _Arguments(BaseModel):
    """Arguments of timm's training script, and the spellings of others; all may be absent."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Annotated[str, Field(max_length=200)] | None = None
    global_pool: Annotated[str, Field(max_length=20)] | None = None
    img_size: Annotated[int, Field(ge=1, le=4096)] | tuple[int, int] | None = None
    input_size: tuple[int, int, int] | Annotated[int, Field(ge=1, le=4096)] | None = None
    model_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """What a checkpoint says about itself.

    Attributes:
        architecture: timm's name, perhaps with a tag.
        model_args: timm arguments that the network was built with.
        preprocess: entries as in timm's `pretrained_cfg`; `input_size` has the size of the images.
        labels: names of the classes in the order of the logits.
        accuracy: top-1 in percent.
        has_arguments: whether it holds the arguments of a training at all.
    """

    architecture: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    accuracy: float | None = None
    has_arguments: bool = False


def said_in(beside: Mapping[str, object]) -> Said:
    """What stands beside the tensors of a checkpoint file."""
    parts = [_plain(beside), *_parts(beside, 0)]
    settings: dict[str, Any] = {}
    for part in reversed(parts):
        settings |= part
    arguments = _checked(_Arguments, _renamed(settings))
    architecture = arguments.get("model") or beside.get("arch")
    return Said(
        architecture=architecture if isinstance(architecture, str) and timm.is_model(architecture) else None,
        model_args=_model_args(arguments),
        preprocess=_preprocess(settings, arguments),
        labels=next((names for part in parts for names in [_labels(part)] if names), None),
        accuracy=_accuracy(beside, settings),
        has_arguments="args" in beside,
    )


def _parts(beside: Mapping[str, object], depth: int) -> Iterator[dict[str, Any]]:
    for name in _PARTS:
        part = _plain(beside.get(name))
        if part:
            yield part
            if depth < _DEEPEST:  # parts may hold themselves
                yield from _parts(part, depth + 1)


def _plain(value: object) -> dict[str, Any]:
    entries = vars(value) if isinstance(value, Record) else value
    return {name_of(key): entry for key, entry in entries.items()} if isinstance(entries, Mapping) else {}


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    pool = settings.get("gp", settings.get("global_pool"))
    sizes = {name: settings.get(name) for name in ("img_size", "input_size")}
    return {**settings, **sizes, "global_pool": {"fast": "avg"}.get(pool, pool) if isinstance(pool, str) else None}


def _checked(kind: type[BaseModel], entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a schema that are valid, each by itself."""
    result = {}
    for name in kind.model_fields:
        value = entries.get(name)
        if value is None or value == "" or value == []:
            continue
        try:
            result[name] = getattr(kind.model_validate({name: value}), name)
        except ValidationError:
            _LOGGER.warning("The checkpoint's entry %s is not what timm writes there, and is left out.", name)
    return result


def _model_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(arguments.get("model_kwargs") or {})
    if arguments.get("global_pool"):
        given.setdefault("global_pool", arguments["global_pool"])
    return given


def _preprocess(settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    known = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    entries = _checked(PreprocessEntries, {name: settings.get(name) for name in known})
    size = arguments.get("input_size") or arguments.get("img_size")
    if isinstance(size, int):
        size = (size, size)
    if size is not None and all(1 <= side <= 4096 for side in size):
        entries["input_size"] = tuple(size[-2:])
    return entries


def _labels(part: Mapping[str, Any]) -> tuple[str, ...] | None:
    for key in _LABELS:
        names = _label_list(part.get(key))
        if names:
            return names
    return None


def _label_list(value: object) -> tuple[str, ...] | None:
    """Names by index, from a list, from names to numbers, or from numbers to names."""
    pairs = _plain(value)
    if pairs:
        turned = all(isinstance(entry, int) for entry in pairs.values())
        by_index = {name_of(entry): key for key, entry in pairs.items()} if turned else pairs
        ordered = {int(key): entry for key, entry in by_index.items() if key.isdecimal() and len(key) < 8}
        value = [ordered.get(index) for index in range(len(by_index))]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) and name for name in value):
        return None
    names = tuple(str(name)[:1_000] for name in value)
    return names if len({*names}) == len(names) else None


def _accuracy(beside: Mapping[str, object], settings: Mapping[str, Any]) -> float | None:
    metric = settings.get("eval_metric", "top1")
    if not isinstance(metric, str) or not metric.startswith("top1"):
        return None
    for name in _ACCURACIES:
        value = beside.get(name)
        if isinstance(value, float) and math.isfinite(value) and 0 < value <= 100:
            return 100 * value if value <= 1 else value
    return None
