"""What the dense network's accuracy on validation images decides, where nothing else tells it: how class folders are
numbered, how a ViT pools its features, which activation it has, and whether its position embedding is for a square."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from upvits.calib_data import DataSource, batches
from upvits.calib_data.choices import Order
from upvits.calib_data.classes import is_ambiguous, with_order
from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.document import Recipe
from upvits.toolchain.networks.found import found_in
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.networks.settle import MEANINGS, Size
from upvits.toolchain.training.evaluate import evaluate

_LOGGER = logging.getLogger(__name__)

JUDGED = 1000
"""Validation images that orders of classes are judged on, at most: two of them are seldom close."""

READ = 256
"""Validation images that each reading of a network is judged on, at most."""

_SHAPES = 32
"""Validation pictures whose height and width are looked at."""

_BATCH = 64
_SIGMAS = 2.0
"""So far from a toss-up must the images be that only one of two readings has right."""

_WHO = {"natural": "as timm does", "text": "as torchvision does"}

Build = Callable[[Recipe], nn.Module]


@dataclass(frozen=True, slots=True)
class _Question:
    """What the weights leave open.

    Attributes:
        about: the sentence that says so.
        option: that settles it.
        answers: by how they are called, the changes of the recipe; the first is what is assumed.
    """

    about: str
    option: str
    answers: Mapping[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Reading:
    """The network as a recipe builds it.

    Attributes:
        right: for every order of classes, which of the judged images it has right, [images] bool.
    """

    recipe: Recipe
    right: Mapping[Order | None, Tensor]

    @property
    def best(self) -> Tensor:
        """Which images it has right in the order that fits it better."""
        return max(self.right.values(), key=lambda hits: int(hits.sum()))

    @property
    def share(self) -> str:
        """How many those are."""
        return _share(self.best)


def settled(
    recipe: Recipe, source: DataSource, dense: nn.Module, build: Build, *, quiet: bool
) -> tuple[Recipe, DataSource, nn.Module, tuple[str, ...]]:
    """The recipe, the data and the network as it was trained, and notes about what was found.

    Nothing changes where one reading is possible, or nothing tells them apart (random weights, no labels, no head).

    Args:
        dense: in eval mode on the device of the run.
        build: makes the same network from another recipe.

    Raises:
        UserError: two orders of classes fit equally well.
    """
    if recipe.weights == "random" or dense.num_classes == 0 or source.class_names is None:
        return recipe, source, dense, ()
    orders: dict[Order | None, DataSource] = {None: source}
    if is_ambiguous(source):
        orders = {order: with_order(source, order) for order in get_args(Order)}
    questions = list(_questions(recipe, source, dense))
    if len(orders) == 1 and not questions:
        return recipe, source, dense, ()
    device = next(dense.parameters()).device

    def read(recipe: Recipe, model: nn.Module | None = None) -> _Reading:
        model = build(recipe).to(device) if model is None else model
        return _Reading(recipe, _right(model, orders, READ if questions else JUDGED, quiet=quiet))

    chosen, notes = read(recipe, dense), []
    for question in questions:
        chosen, note = _answered(question, chosen, read)
        notes.append(note)
    if questions:  # says of itself what was found
        recipe, dense = chosen.recipe, build(chosen.recipe).to(device)
    if len(orders) > 1:
        order, note = _order(recipe, orders, chosen)
        recipe, source = recipe.model_copy(update={"class_order": order}), orders[order]
        notes.append(note)
    for note in notes:
        _LOGGER.info("%s", note)
    return recipe, source, dense, tuple(notes)


def _right(
    model: nn.Module, orders: Mapping[Order | None, DataSource], count: int, *, quiet: bool
) -> dict[Order | None, Tensor]:
    """One pass over some validation images: which are right, [images] bool, with the labels of each order."""
    judged = next(iter(orders.values())).val.spread(count)
    images = batches(judged, preprocess_of(model), _BATCH)
    predictions = evaluate(model, images, quiet=quiet, total=-(-len(judged) // _BATCH)).predictions
    return {order: predictions == torch.tensor(source.val.spread(count).labels) for order, source in orders.items()}


def _questions(recipe: Recipe, source: DataSource, dense: nn.Module) -> Iterator[_Question]:
    found = found_in(dense)
    for name, values in found.untold.items():
        answers = {f"{name}={value}": {"model_args": {name: value}} for value in values}
        yield _Question(f"The file does not say {MEANINGS[name]}.", "--model-arg", answers)
    size = None if recipe.image_size is not None else _like_pictures(source, found.other_sizes)
    if size is not None:
        own = preprocess_of(dense).input_size[1:]
        sides = [f"{height} x {width} pixels" for height, width in (own, size)]
        about = f"The position embedding fits images of {sides[0]} and of {sides[1]}."
        yield _Question(about, "--image-size", {sides[0]: {}, sides[1]: {"image_size": size}})


def _like_pictures(source: DataSource, sizes: Sequence[Size]) -> Size | None:
    """The one of several sizes that is nearest to the shape of the pictures; None where a square is nearer."""
    if not sizes:
        return None
    shapes = sorted(math.log(image.height / image.width) for image, _ in source.val.spread(_SHAPES))
    middle = shapes[len(shapes) // 2]
    nearest = min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - middle))
    return nearest if abs(math.log(nearest[0] / nearest[1]) - middle) < abs(middle) else None


def _answered(question: _Question, before: _Reading, read: Callable[[Recipe], _Reading]) -> tuple[_Reading, str]:
    """The reading that fits best, and a note; what is assumed stays unless another answer is clearly better."""
    readings = {name: _changed(before.recipe, change) for name, change in question.answers.items()}
    assumed, *others = readings
    judged = {assumed: replace(before, recipe=readings[assumed]), **{name: read(readings[name]) for name in others}}
    best = max(others, key=lambda name: int(judged[name].best.sum()))
    is_better = _advantage(judged[best].best, judged[assumed].best) > 0
    chosen = best if is_better else assumed
    rest = " and ".join(f"on {one.share} with {name}" for name, one in judged.items() if name != chosen)
    why = "because" if is_better else "as is usual, and nothing is clearly better:"
    note = (
        f"{question.about} {chosen} is taken, {why} "
        f"the dense network is right on {judged[chosen].share} of {len(before.best)} validation images so, and {rest}. "
        f"{question.option} settles it."
    )
    return judged[chosen], note


def _changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """A recipe with other values; arguments of the network are added to those that there are."""
    merged = {name: recipe.model_args | value if name == "model_args" else value for name, value in change.items()}
    return recipe.model_copy(update=merged)


def _order(recipe: Recipe, orders: Mapping[Order | None, DataSource], read: _Reading) -> tuple[Order, str]:
    """The order of classes that fits better, and a note.

    Raises:
        UserError: both fit alike.
    """
    images = len(read.best)
    about = {
        order: f"{order} order ({_start(orders[order])}; {_WHO[order]}) {_share(read.right[order])}"
        for order in get_args(Order)
    }
    advantage = _advantage(read.right["natural"], read.right["text"])
    if advantage == 0:
        raise UserError(
            f"The classes of {recipe.data} can be numbered in two ways, and the network fits both alike.",
            why=f"Right are, of {images} validation images, in {about['natural']}, in {about['text']}.",
            fix="Say in which order the network was trained: --class-order natural or --class-order text; --class-map "
            "gives every number. Where both are near guessing, the weights are of other data, or the images are "
            "prepared in another way than in training.",
        )
    chosen: Order = "natural" if advantage > 0 else "text"
    other: Order = "text" if advantage > 0 else "natural"
    return chosen, (
        f"Classes are numbered in {chosen} order ({_start(orders[chosen])}; {_WHO[chosen]}), because the dense "
        f"network is right on {_share(read.right[chosen])} of {images} validation images so, and on "
        f"{_share(read.right[other])} in {other} order. --class-order settles it."
    )


def _advantage(one: Tensor, other: Tensor) -> int:
    """By how many images the one is right more often than the other; 0 for a toss-up."""
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    is_clear = abs(only_one - only_other) > _SIGMAS * (only_one + only_other) ** 0.5
    return only_one - only_other if is_clear else 0


def _share(right: Tensor) -> str:
    return f"{100 * float(right.float().mean()):.1f} %"


def _start(source: DataSource) -> str:
    names: Sequence[str] = source.class_names or ()
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
