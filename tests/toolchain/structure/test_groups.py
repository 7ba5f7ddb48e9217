"""Index arithmetic of slices and cuts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from upvits.toolchain.structure.groups import ChannelGroup, Slice, Widths, axis_indices, cut, narrowed_shapes


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.data())
def test_indices_are_where_a_reshape_puts_the_units(repeat: int, size: int, unit: int, data: st.DataObject) -> None:
    keep = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    axis = torch.arange(repeat * size * unit)
    expected = axis.view(repeat, size, unit)[:, keep].flatten()
    assert axis_indices(Slice("w", 0, repeat, unit), size, keep).tolist() == expected.tolist()


def test_cut_slices_every_axis_that_a_group_owns_and_shares_the_rest() -> None:
    group = ChannelGroup("g", "embed", 3, (Slice("square", 0), Slice("square", 1), Slice("bias", 0)), ())
    state = {"square": torch.arange(9.0).view(3, 3), "bias": torch.arange(3.0), "other": torch.ones(2)}
    result = cut(state, [group], {"g": torch.tensor([0, 2])})
    assert result["square"].tolist() == [[0, 2], [6, 8]]
    assert result["bias"].tolist() == [0, 2]
    assert result["other"] is state["other"]
    assert state["square"].shape == (3, 3)


def test_narrowed_shapes_follow_the_formula() -> None:
    group = ChannelGroup("g", "attention", 6, (Slice("qkv", 0, repeat=3), Slice("proj", 1)), (), num_heads=2)
    shapes = {"qkv": torch.Size([18, 5]), "proj": torch.Size([5, 6])}
    assert narrowed_shapes(shapes, [group], Widths({"g": 4}, {"g": 2})) == {"qkv": [12, 5], "proj": [5, 4]}
    assert narrowed_shapes(shapes, [group], Widths({}, {})) == {"qkv": [18, 5], "proj": [5, 6]}
