"""What every reader returns: two labelled datasets with the names of their classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch.utils.data import Dataset

from upvits.calib_data.errors import UserError

UNLABELLED = -1

MAX_CLASSES = 100_000
"""A head for so many classes fits into memory; the largest public set of images has 21,841."""


SHUFFLE_BUFFER = 10_000
"""Pictures that training mixes at a time where they are read as a stream."""


class Images(Dataset[tuple[Image.Image, int]]):
    """Pictures by position: `images[i]` is (PIL image in RGB, label), the label -1 when there is none.

    `labels` are known without reading a picture; `read(i)` gives the picture. `runs`: how many of them, one after the
    other, lie in one file that is better read from front to back; nothing for files of their own.

    Raises:
        UserError: a label is below -1, or too large for any list of classes.
    """

    def __init__(self, labels: Sequence[int], read: Callable[[int], Image.Image], runs: Sequence[int] = ()) -> None:
        strange = next((label for label in labels if not UNLABELLED <= label < MAX_CLASSES), None)
        if strange is not None:
            raise UserError(
                f"There is an image with the label {strange}.",
                why=f"Labels number the classes from 0, and there are at most {MAX_CLASSES:,}.",
                fix="Correct the labels.",
            )
        self.labels = tuple(labels)
        self.runs = tuple(runs)
        self._read = read

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = self.labels[index]
        return self._read(index), label

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return (self[index] for index in range(len(self)))

    def spread(self, most: int) -> Images:
        """At most so many of them, evenly spread, since folders come class by class."""
        count = min(most, len(self))
        positions = [index * len(self) // count for index in range(count)]
        return Images([self.labels[i] for i in positions], lambda i: self[positions[i]][0])

    def renumbered(self, numbers: Sequence[int]) -> Images:
        """The same pictures with `numbers[label]` for every label."""
        return Images([numbers[label] if label >= 0 else label for label in self.labels], self._read, self.runs)


@dataclass(frozen=True, slots=True)
class DataSource:
    """An opened image set.

    Attributes:
        spec: what it was opened with.
        class_names: by label; None when the pictures carry no labels.
        train: pictures for scoring, calibration and training.
        val: pictures that accuracy is measured on.
        digest: sha256 over what the set contains; equal digests mean equal data.
        skipped: unreadable files that were left out.
        numbered_by_name: whether labels are positions in the sorted names of the classes, because nothing else tells
            them; whoever trained a network may have sorted in another way.
        notes: what was found out about the set, for the report.
    """

    spec: str
    class_names: tuple[str, ...] | None
    train: Images
    val: Images
    digest: str
    skipped: tuple[str, ...] = ()
    numbered_by_name: bool = False
    notes: tuple[str, ...] = ()

    def renumbered(self, names: Sequence[str]) -> DataSource:
        """The same images with labels that are positions in `names`, which has all of its classes and perhaps more."""
        if self.class_names is None or tuple(names) == self.class_names:
            return self
        position = {name: number for number, name in enumerate(names)}
        numbers = [position[name] for name in self.class_names]
        digest = hashlib.sha256("\n".join((self.digest, *names)).encode(errors="surrogateescape"))
        return replace(
            self,
            class_names=tuple(names),
            train=self.train.renumbered(numbers),
            val=self.val.renumbered(numbers),
            digest=digest.hexdigest(),
        )
