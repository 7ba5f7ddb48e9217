"""The knapsack against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upvits.toolchain.planning.knapsack import Item, cheapest_choice, hull, lower_bound

whole_options = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)), min_size=1, max_size=5)


def items_of(options: list[list[tuple[int, int]]]) -> list[Item]:
    return [Item(*np.array(own, dtype=np.float64).T) for own in options]


def by_trying(items: list[Item], budget: float) -> float:
    """The smallest loss of all choices within the budget; infinite when there is none."""
    choices = product(*(list(zip(item.costs, item.losses, strict=True)) for item in items))
    return min((sum(o[1] for o in c) for c in choices if sum(o[0] for o in c) <= budget), default=float("inf"))


@given(st.lists(whole_options, min_size=1, max_size=4), st.integers(0, 40))
def test_it_is_optimal_on_whole_costs(options: list[list[tuple[int, int]]], budget: int) -> None:
    items = items_of(options)
    free = budget - int(sum(item.costs.min() for item in items))
    chosen = cheapest_choice(items, budget, cells=max(free, 1))
    if chosen is None:
        assert by_trying(items, budget) == float("inf")
        return
    assert sum(item.costs[index] for item, index in zip(items, chosen, strict=True)) <= budget
    loss = sum(item.losses[index] for item, index in zip(items, chosen, strict=True))
    assert loss == by_trying(items, budget)


@given(st.lists(whole_options, min_size=1, max_size=4), st.floats(0, 40))
def test_a_coarse_grid_still_keeps_the_budget(options: list[list[tuple[int, int]]], budget: float) -> None:
    items = items_of(options)
    chosen = cheapest_choice(items, budget, cells=5)
    if chosen is not None:
        assert sum(item.costs[index] for item, index in zip(items, chosen, strict=True)) <= budget + 1e-9


@given(st.lists(whole_options, min_size=1, max_size=4), st.integers(0, 40))
def test_the_bound_is_below_every_choice(options: list[list[tuple[int, int]]], budget: int) -> None:
    items = items_of(options)
    bound, best = lower_bound([hull(item) for item in items], budget), by_trying(items, budget)
    assert bound <= best + 1e-9
    assert (bound == float("inf")) == (best == float("inf"))


def test_the_bound_is_reached_where_the_budget_ends_at_a_corner() -> None:
    items = items_of([[(4, 0), (2, 1), (0, 5)], [(3, 0), (0, 9)]])
    assert lower_bound([hull(item) for item in items], 5) == by_trying(items, 5) == 1


def test_the_hull_leaves_out_what_no_price_would_buy() -> None:
    points = hull(Item(np.array([0.0, 1.0, 2.0, 3.0, 3.0]), np.array([10.0, 9.0, 2.0, 2.0, 1.0])))
    assert points.costs.tolist() == [0, 2, 3]
    assert points.losses.tolist() == [10, 2, 1]


def test_all_of_a_budget_that_is_free_can_be_used() -> None:
    items = items_of([[(0, 1), (1, 0)]] * 3)
    assert cheapest_choice(items, 3.0, cells=7) == [1, 1, 1]
    assert cheapest_choice(items_of([[(0, 1), (1, 0)]] * 9), 9.0, cells=7) == [1] * 9
    assert cheapest_choice(items, 0.0) == [0, 0, 0]
    assert cheapest_choice(items, -1.0) is None
    assert sum(cheapest_choice(items, 2.0, cells=2) or []) == 2


@pytest.mark.parametrize("cells", [64, 4096])
def test_a_finer_grid_wastes_less(cells: int) -> None:
    generator = np.random.default_rng(0)
    items = [Item(np.sort(generator.random(20)), np.sort(generator.random(20))[::-1].copy()) for _ in range(10)]
    chosen = cheapest_choice(items, 5.0, cells)
    assert chosen is not None
    loss = sum(item.losses[index] for item, index in zip(items, chosen, strict=True))
    bound = lower_bound([hull(item) for item in items], 5.0)
    assert bound <= loss <= bound + 10 / cells * 10 + 0.1
