"""Which number a class folder has: where natural and text order differ, the dense network's accuracy decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from upvits.calib_data import DataSource, Preprocess, batches
from upvits.calib_data.choices import Order
from upvits.calib_data.classes import is_ambiguous, with_order
from upvits.calib_data.errors import UserError
from upvits.deploy.recipe.document import Recipe
from upvits.toolchain.training.evaluate import evaluate

_LOGGER = logging.getLogger(__name__)

JUDGED = 1000
"""Validation images that orders are judged on, at most: two of them are seldom close."""

_BATCH = 64
_SIGMAS = 2.0
"""So far from a toss-up must the images be that only one of the orders has right."""

_WHO = {"natural": "as timm does", "text": "as torchvision does"}


def numbered(
    recipe: Recipe, source: DataSource, dense: nn.Module, preprocess: Preprocess, *, quiet: bool
) -> tuple[Recipe, DataSource, str | None]:
    """The recipe and the data with the order of classes that the network was trained in, and a note where it was found.

    Nothing changes where one order is possible, or nothing tells them apart (random weights, no labels, no head).

    Raises:
        UserError: both orders fit equally well.
    """
    if not is_ambiguous(source) or recipe.weights == "random" or dense.num_classes == 0:
        return recipe, source, None
    readings = {order: with_order(source, order) for order in get_args(Order)}
    labels = {order: torch.tensor(reading.val.spread(JUDGED).labels) for order, reading in readings.items()}
    judged = source.val.spread(JUDGED)
    images = batches(judged, preprocess, _BATCH)
    predictions = evaluate(dense, images, quiet=quiet, total=-(-len(judged) // _BATCH)).predictions
    right = {order: predictions == of_order for order, of_order in labels.items()}
    shares = {order: f"{100 * float(hits.float().mean()):.1f} %" for order, hits in right.items()}
    chosen = _better(right)
    about = {order: f"{order} order ({_start(readings[order])}; {_WHO[order]}) {shares[order]}" for order in readings}
    if chosen is None:
        raise UserError(
            f"The classes of {recipe.data} can be numbered in two ways, and the network fits both alike.",
            why=f"Right are, of {len(judged)} validation images, in {about['natural']}, in {about['text']}.",
            fix="Say in which order the network was trained: --class-order natural or --class-order text; --class-map "
            "gives every number. Where both are near guessing, the weights are of other data, or the images are "
            "prepared in another way than in training.",
        )
    other = next(order for order in readings if order != chosen)
    note = (
        f"Classes are numbered in {chosen} order ({_start(readings[chosen])}; {_WHO[chosen]}), because the dense "
        f"network is right on {shares[chosen]} of {len(judged)} validation images so, and on {shares[other]} in "
        f"{other} order. --class-order settles it."
    )
    _LOGGER.info("%s", note)
    return recipe.model_copy(update={"class_order": chosen}), readings[chosen], note


def _better(right: dict[Order, Tensor]) -> Order | None:
    """The order that fits better, by the images that only one of them has right; None for a toss-up."""
    natural = int((right["natural"] & ~right["text"]).sum())
    text = int((right["text"] & ~right["natural"]).sum())
    if abs(natural - text) <= _SIGMAS * (natural + text) ** 0.5:
        return None
    return "natural" if natural > text else "text"


def _start(source: DataSource) -> str:
    names: Sequence[str] = source.class_names or ()
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
