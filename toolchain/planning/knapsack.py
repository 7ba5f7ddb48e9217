"""The multiple-choice knapsack: one option of every item, the smallest total loss within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CELLS = 8192
"""Steps of the cost grid. The choice is the best one for a budget that is smaller by at most (items) / CELLS."""


@dataclass(frozen=True, slots=True)
class Item:
    """Options of one item.

    Attributes:
        costs: [n], in any unit.
        losses: [n].
    """

    costs: NDArray[np.float64]
    losses: NDArray[np.float64]


def cheapest_choice(items: Sequence[Item], budget: float, cells: int = CELLS) -> list[int] | None:
    """The options with the smallest total loss whose total cost is within the budget, by dynamic programming.

    Exact for costs that are whole steps of the grid; others are rounded up, so the budget always holds.

    Args:
        items: what to choose from.
        budget: in the unit of the costs.
        cells: steps of the grid between the cheapest choice of all and the budget.

    Returns:
        An option per item; None when even the cheapest options exceed the budget.
    """
    least = np.array([item.costs.min() for item in items])
    free = budget - least.sum()
    if free < 0:
        return None
    step = free / cells if free > 0 else 1.0
    best = np.zeros(cells + 1)  # smallest loss when at most g steps are spent
    chosen = []
    for item, base in zip(items, least, strict=True):
        extra = item.costs - base
        # a hair less than the quotient: whole steps stay whole in floating point
        steps = np.ceil(np.where(extra <= free, np.minimum(extra, free) / step - 1e-9, cells + 1)).astype(np.int64)
        extended, pick = np.full(cells + 1, np.inf), np.zeros(cells + 1, dtype=np.int32)
        for option in _worthwhile(steps, item.losses):
            spent = steps[option]
            if spent > cells:
                continue
            loss = best[: cells + 1 - spent] + item.losses[option]
            better = loss < extended[spent:]
            extended[spent:][better] = loss[better]
            pick[spent:][better] = option
        best = extended
        chosen.append((pick, steps))
    result, left = [], cells
    for pick, steps in reversed(chosen):
        result.append(int(pick[left]))
        left -= int(steps[result[-1]])
    return _spend_rest(items, result[::-1], budget)


def _spend_rest(items: Sequence[Item], chosen: list[int], budget: float) -> list[int]:
    """Use what rounding up left of the budget: the exchange that gains most, as long as one fits."""
    chosen = list(chosen)
    while True:
        spent = sum(item.costs[index] for item, index in zip(items, chosen, strict=True))
        best = (0.0, 0, 0)
        for position, (item, index) in enumerate(zip(items, chosen, strict=True)):
            fits = item.costs - item.costs[index] <= budget - spent
            gains = np.where(fits, item.losses[index] - item.losses, 0.0)
            best = max(best, (float(gains.max()), position, int(gains.argmax())))
        if best[0] <= 0:
            return chosen
        chosen[best[1]] = best[2]


def _worthwhile(costs: NDArray[np.int64], losses: NDArray[np.float64]) -> list[int]:
    """Options that no other one beats in both cost and loss, by rising cost."""
    kept: list[int] = []
    for option in np.lexsort((losses, costs)):
        if not kept or losses[option] < losses[kept[-1]]:
            kept.append(int(option))
    return kept


def hull(item: Item) -> Item:
    """The options on the lower convex hull, by rising cost and falling loss."""
    points: list[tuple[float, float]] = []
    for index in np.lexsort((item.losses, item.costs)):
        point = (float(item.costs[index]), float(item.losses[index]))
        if points and point[1] >= points[-1][1]:
            continue
        while len(points) > 1 and _above(points[-2], points[-1], point):
            points.pop()
        points.append(point)
    costs, losses = np.array(points).T
    return Item(costs, losses)


def _above(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether `middle` is on or above the line from `left` to `right`."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def lower_bound(hulls: Sequence[Item], budget: float) -> float:
    """The smallest total loss when options could be mixed: never above that of any real choice.

    Args:
        hulls: items as `hull` returns them.
        budget: in the unit of the costs.

    Returns:
        The loss; infinite when even the cheapest options exceed the budget.
    """
    free = budget - sum(item.costs[0] for item in hulls)
    if free < 0:
        return float("inf")
    loss = sum(item.losses[0] for item in hulls)
    costs = np.concatenate([np.diff(item.costs) for item in hulls])
    gains = -np.concatenate([np.diff(item.losses) for item in hulls])
    order = np.argsort(-gains / costs, kind="stable")
    spent = costs[order].cumsum()
    whole = int(np.searchsorted(spent, free, side="right"))
    loss -= gains[order][:whole].sum()
    if whole < len(order):
        left = free - (spent[whole - 1] if whole else 0.0)
        loss -= gains[order][whole] * left / costs[order][whole]
    return float(loss)
