"""From outputs of two networks on the same images to what people look at: classes, and images worth showing."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]

_QUALITIES = (80, 60, 40, 20)
_SHARE_OF_AGREEING = 1 / 3


def best_classes(logits: Array, most: int) -> list[tuple[int, float]]:
    """The classes with the largest of the outputs [K] and their probabilities in percent, best first.

    >>> [(index, round(percent, 1)) for index, percent in best_classes(np.array([0.0, 2.0, 1.0]), 2)]
    [(1, 66.5), (2, 24.5)]
    """
    values = logits.reshape(-1).astype(np.float64)
    shares = np.exp(values - values.max())
    shares *= 100 / shares.sum()
    return [(int(index), float(shares[index])) for index in np.argsort(-values, kind="stable")[:most]]


def worth_showing(dense: Array, pruned: Array, labels: Array, most: int) -> list[int]:
    """Positions of at most `most` images, those with different answers first.

    Among those, images that only the dense network has right, that only the pruned one has right, and that both have
    wrong (or that have no label) take turns: none of the three hides another. A third of the images, where there are so
    many, are ones on which the networks agree, evenly spread.

    Args:
        dense: answers [N] of the dense network, as numbers of classes.
        pruned: those of the pruned one.
        labels: [N], -1 for none.
        most: how many.
    """
    differ = dense != pruned
    lost, won = differ & (dense == labels), differ & (pruned == labels)
    kinds = [np.flatnonzero(kind).tolist() for kind in (lost, won, differ & ~lost & ~won)]
    turns = sorted((turn, kind, i) for kind, found in enumerate(kinds) for turn, i in enumerate(found))
    differing = [i for _, _, i in turns]
    agreeing = np.flatnonzero(~differ).tolist()
    few = min(len(agreeing), max(most - len(differing), int(most * _SHARE_OF_AGREEING)))
    spread = [agreeing[i * len(agreeing) // few] for i in range(few)]
    return differing[: most - len(spread)] + spread


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Labelled images of a class, those that the dense network has right, and those that one network alone has."""

    images: int
    dense: int
    lost: int
    won: int


def counts_by_class(dense: Array, pruned: Array, labels: Array) -> dict[int, ClassCounts]:
    """By the number of every class that has images; args as of `worth_showing`."""
    labelled = labels >= 0
    right, still_right = (labelled & (answers == labels) for answers in (dense, pruned))
    size = int(labels.max(initial=-1)) + 1
    kinds = (labelled, right, right & ~still_right, still_right & ~right)
    counts = [np.bincount(labels[kind], minlength=size).tolist() for kind in kinds]
    return {label: ClassCounts(*of_class) for label, of_class in enumerate(zip(*counts, strict=True)) if of_class[0]}


def thumbnail(image: Image.Image, size: int, largest: int = 48 << 10) -> str:
    """A copy of at most `size` by `size` pixels as JPEG in base64, without anything that the file said beside pixels.

    Args:
        largest: characters at most, where lowering the quality can reach that.
    """
    small = image.convert("RGB")
    small.thumbnail((size, size))
    small.info = {}
    text = ""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=quality)
        text = base64.b64encode(stream.getvalue()).decode()
        if len(text) <= largest:
            break
    return text
