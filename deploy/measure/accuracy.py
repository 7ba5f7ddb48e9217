"""What a precision costs: top-1, agreement and signal-to-noise of sessions on real images, in one pass for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from upvits.calib_data.errors import GateError
from upvits.calib_data.progress import watched
from upvits.deploy.measure.uncertainty import change_error
from upvits.deploy.runtimes.interface import Session

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A candidate held against a reference on the same images; percent, and dB.

    Attributes:
        top1: of the labelled images; None without labels.
        agreement: images with the reference's top-1.
        drop: points of top-1 lost against the reference; without labels, points of agreement lost.
        sqnr_db: power of the reference's outputs over the power of the difference; 200 when they are equal.
        lost: images that only the reference has right; without labels, images with another top-1. None: not counted.
        won: images that only the candidate has right.
    """

    images: int
    top1: float | None
    agreement: float
    drop: float
    sqnr_db: float
    lost: int | None = None
    won: int | None = None

    def loses_more_than(self, limit: float) -> bool:
        """Whether it loses more than `limit` points, by more than the standard error of that loss: one image of a
        small set decides nothing.
        """
        return self.drop - self.drop_error > limit

    @property
    def drop_error(self) -> float:
        """The standard error of `drop`, in points; 0 where images were not counted."""
        if self.lost is None or self.won is None or not self.drop:
            return 0.0
        # of the labelled images, whose number follows from the drop
        return change_error(self.lost, self.won, max(1, round(100 * (self.lost - self.won) / self.drop)))


def outputs_of(
    sessions: Mapping[str, Session],
    batches: Iterable[tuple[Array, Array]],
    batch_size: int,
    *,
    total: int | None = None,
    quiet: bool = True,
) -> tuple[dict[str, Array], Array]:
    """First outputs of sessions, and the labels, over batches that are decoded once for all of them.

    Args:
        sessions: by name.
        batches: (input [B, ...] as the sessions take it, labels [B]), B at most `batch_size`.
        batch_size: every session gets batches of exactly this size (engines may accept no smaller ones): the last one
            is filled up, and what it was filled with left out of the result.
        total: number of batches, for the progress bar.

    Returns:
        Outputs [N, K] float32 by name, labels [N].
    """
    collected: dict[str, list[Array]] = {name: [] for name in sessions}
    labels: list[Array] = []
    for images, batch_labels in watched(batches, "accuracy", quiet=quiet, total=total):
        filled = images if len(images) == batch_size else np.resize(images, (batch_size, *images.shape[1:]))
        for name, session in sessions.items():
            output = session.run({session.input_names[0]: filled})[session.output_names[0]]
            collected[name].append(np.asarray(output, np.float32)[: len(images)])
        labels.append(np.asarray(batch_labels))
    return {name: np.concatenate(parts) for name, parts in collected.items()}, np.concatenate(labels)


def accuracy(reference: Array, candidate: Array, labels: Array, name: str = "the candidate") -> Accuracy:
    """Hold outputs [N, K] against the reference's, with labels [N] (-1: unlabelled).

    Raises:
        GateError: an output is not finite.
    """
    if not np.isfinite(candidate).all():
        raise GateError(
            f"{name} gives NaN or infinity",
            why="Values overflow in this precision.",
            fix="Use another precision: bf16 has the range of fp32.",
        )
    predicted, expected = candidate.argmax(1), reference.argmax(1)
    labelled = int((labels >= 0).sum())
    agreeing = int((predicted == expected).sum())
    right, right_before = (((answer == labels) & (labels >= 0)) for answer in (predicted, expected))
    lost, won = int((right_before & ~right).sum()), int((right & ~right_before).sum())
    if not labelled:
        lost, won = len(labels) - agreeing, 0
    # from counts: a difference of two percentages may miss a limit by its last bit
    drop = 100.0 * (lost - won) / (labelled or len(labels))
    return Accuracy(
        images=len(labels),
        top1=100.0 * int(right.sum()) / labelled if labelled else None,
        agreement=100.0 * agreeing / len(labels),
        drop=drop,
        sqnr_db=sqnr_db(reference, candidate),
        lost=lost,
        won=won,
    )


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Signal-to-quantization-noise ratio in dB, at most 200.

    >>> import numpy as np
    >>> round(sqnr_db(np.array([[10.0, 0.0]]), np.array([[10.0, 0.1]])), 1)
    40.0
    """
    signal = float(np.square(reference.astype(np.float64)).sum())
    noise = float(np.square(reference.astype(np.float64) - candidate.astype(np.float64)).sum())
    return min(200.0, 10.0 * float(np.log10(signal / noise))) if noise > 0 and signal > 0 else 200.0
