"""Predictions of networks for pictures, and how long each took."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from upvits.calib_data.errors import GateError, UserError
from upvits.calib_data.loading import Transform
from upvits.calib_data.progress import watched
from upvits.deploy.measure.answers import best_classes, thumbnail
from upvits.deploy.predict.networks import Logits, Network, open_networks
from upvits.deploy.predict.pictures import common_depth, pictures_in, read

_LOGGER = logging.getLogger(__name__)

TOP = 5
_CALLS = 3
_WARM_UP = 3
_THUMBNAIL = 240


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Guess(_Document):
    """A class and its probability in percent; `index` is the position among the outputs."""

    label: str
    index: int
    percent: float


class Prediction(_Document):
    """The best classes of a network, best first, and the median of some calls with this picture alone."""

    top: tuple[Guess, ...]
    ms: float


class PicturePredictions(_Document):
    """What every network says of a picture, by its name; `thumbnail` is a small JPEG in base64, for pages only."""

    path: str
    predictions: dict[str, Prediction]
    thumbnail: str = Field(default="", exclude=True)

    @property
    def agree(self) -> bool:
        """Whether all networks have the same best class."""
        return len({prediction.top[0].index for prediction in self.predictions.values()}) == 1


class Unread(_Document):
    """A file that is no picture, and why."""

    path: str
    why: str


class Predictions(_Document):
    """All of it.

    Attributes:
        source: what the networks came from.
        networks: runtime and precision by name.
        median_ms: of a picture, by network; preparation of pictures is not in it.
        agreement: percent of the pictures on which all networks have the same best class; None of a single network.
    """

    format_version: Literal[1] = 1
    source: str
    networks: dict[str, str]
    median_ms: dict[str, float]
    agreement: float | None
    pictures: tuple[PicturePredictions, ...]
    unread: tuple[Unread, ...]


def predict(
    source: Path,
    pictures: Sequence[Path],
    *,
    runtime: str | None = None,
    precision: str | None = None,
    class_map: Path | None = None,
    thumbnails: bool = False,
    quiet: bool = True,
) -> Predictions:
    """What networks see in pictures; unreadable files are left out, and named.

    Args:
        source: a run (its dense and its pruned network), a package, a model folder, or an ONNX file.
        pictures: files, and folders with pictures at any depth.
        runtime: see `open_networks`; so are `precision` and `class_map`.
        thumbnails: keep small copies of the pictures, for a page.

    Raises:
        UserError: the source cannot be used, or none of the pictures can be read.
        MissingDependencyError: the runtime does not work here.
        GateError: a network gives NaN.
    """
    paths = pictures_in(pictures)
    shown: list[PicturePredictions] = []
    unread: list[Unread] = []
    with open_networks(source, runtime=runtime, precision=precision, class_map=class_map) as networks:
        transforms = [network.preprocess.eval_transform() for network in networks]
        depth = common_depth(paths)
        for path in watched(paths, "predicting", quiet=quiet):
            image = read(path, depth)
            if isinstance(image, str):
                unread.append(Unread(path=str(path), why=image))
                _LOGGER.warning("%s cannot be read: %s", path, image)
                continue
            made = {
                network.name: _predicted(network, transform, image, warm=not shown)
                for network, transform in zip(networks, transforms, strict=True)
            }
            small = thumbnail(image, _THUMBNAIL) if thumbnails else ""
            shown.append(PicturePredictions(path=str(path), predictions=made, thumbnail=small))
        if not shown:
            raise UserError(
                f"None of the {len(unread)} pictures can be read, for example {unread[0].path}.",
                why=unread[0].why,
                fix="Give JPEG, PNG, WebP or other common picture files.",
            )
        runs_in = {network.name: network.runs_in for network in networks}
    return Predictions(
        source=str(source),
        networks=runs_in,
        median_ms={name: _median_ms(name, shown) for name in runs_in},
        agreement=100 * sum(one.agree for one in shown) / len(shown) if len(runs_in) > 1 else None,
        pictures=tuple(shown),
        unread=tuple(unread),
    )


def _median_ms(name: str, shown: Sequence[PicturePredictions]) -> float:
    return round(statistics.median(one.predictions[name].ms for one in shown), 3)


def _predicted(network: Network, transform: Transform, image: Image.Image, *, warm: bool) -> Prediction:
    fed = network.feed(transform(image).unsqueeze(0))
    for _ in range(_WARM_UP if warm else 0):
        network.run(fed)
    times = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        logits = network.run(fed)
        times.append(1e3 * (time.perf_counter() - started))
    return Prediction(top=_best(network, logits), ms=round(statistics.median(times), 3))


def _best(network: Network, logits: Logits) -> tuple[Guess, ...]:
    if not np.isfinite(logits).all() or logits.size != len(network.labels):
        raise GateError(
            f"{network.name} ({network.runs_in}) gives no usable outputs.",
            why="They are NaN or infinity, or not one for each class.",
            fix="Use another precision.",
        )
    return tuple(
        Guess(label=network.labels[index], index=index, percent=round(percent, 2))
        for index, percent in best_classes(logits, TOP)
    )


def figures_of(predictions: Predictions) -> Mapping[str, Any]:
    """The document as plain values, with the agreement of every picture."""
    document = predictions.model_dump(mode="json")
    for entry, picture in zip(document["pictures"], predictions.pictures, strict=True):
        entry["agree"] = picture.agree
    return document
