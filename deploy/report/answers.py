"""What a report says of single images and classes: answers of both networks, and how the fine-tune went.

Units: probabilities and accuracies in percent.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from upvits.calib_data.documents import Count, Name, Natural, Number

MOST_CLASSES = 1_000
"""Classes that a report lists; those that change most come first."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(_Document):
    """A class and its probability; `label` is its name."""

    label: Name
    percent: Number


class Sample(_Document):
    """One validation image: the best answers of both networks, best first, and the truth where there is a label.

    `image` is a small JPEG in base64.
    """

    truth: Name | None
    dense: Annotated[list[Answer], Field(min_length=1, max_length=10)]
    pruned: Annotated[list[Answer], Field(min_length=1, max_length=10)]
    agree: bool
    image: Annotated[str, Field(max_length=64 << 10, pattern=r"^[A-Za-z0-9+/=]*$")]


class ClassFigures(_Document):
    """The images of one class: `dense` of them are right by the dense network, `lost` by it alone, and `won` by the
    pruned one alone.
    """

    name: Name
    images: Natural
    dense: Count
    lost: Count
    won: Count

    @property
    def change(self) -> float:
        """What pruning did to the accuracy of the class, in points."""
        return 100 * (self.won - self.lost) / self.images


class Answers(_Document):
    """Both networks, in fp32, on the validation images that precisions are judged on.

    `differing` images get another answer from each network. `classes` is empty without labels; the worst changes come
    first, and of more than `MOST_CLASSES` classes `classes_left_out` are not listed.
    """

    images: Natural
    differing: Count
    classes: Annotated[list[ClassFigures], Field(max_length=MOST_CLASSES)] = []
    classes_left_out: Count = 0
    samples: Annotated[list[Sample], Field(max_length=100)] = []


class Epoch(_Document):
    """One epoch of the fine-tune: `loss` is the mean that was minimised, `top1` of the validation images.

    `agreement` with the dense network takes the place of `top1` where there are no labels; both are None of epochs
    after which nothing was judged.
    """

    epoch: Natural
    loss: Number
    top1: Number | None
    agreement: Number | None
    seconds: Number
