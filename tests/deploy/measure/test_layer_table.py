"""Layer table: the same layer of two models stands in one row, and no layer is lost."""

from upvits.deploy.measure.layer_table import layer_table
from upvits.deploy.runtimes.interface import LayerTime


def table(dense: list[tuple[str, str]], pruned: list[tuple[str, str]]) -> list[tuple[str, float | None, float | None]]:
    def timed(entries: list[tuple[str, str]]) -> list[LayerTime]:
        return [LayerTime(name, op, float(i + 1)) for i, (name, op) in enumerate(entries)]

    return [(row.name, row.dense_ms, row.pruned_ms) for row in layer_table(timed(dense), timed(pruned))]


def test_layers_are_matched_by_name_wherever_they_are() -> None:
    assert table([("a", "Conv"), ("b", "Add")], [("b", "Add"), ("a", "Conv")]) == [("a", 1, 2), ("b", 2, 1)]
    assert table([("a", "Conv"), ("a", "Conv")], [("a", "Conv"), ("a", "Conv")]) == [("a", 1, 1), ("a", 2, 2)]


def test_fused_layers_are_matched_by_a_node_in_them() -> None:
    rows = table(
        [("fc1 + gelu", "gemm"), ("[norm+add]", "norm")],
        [("fc1", "gemm"), ("gelu", "act"), ("{add, norm}", "norm")],
    )
    assert rows == [("fc1 + gelu", 1, 1), ("gelu", None, 2), ("[norm+add]", 2, 3)]


def test_unnamed_layers_are_matched_by_kind_between_named_ones() -> None:
    rows = table(
        [("k1", "reorder"), ("conv", "Conv"), ("k2", "reorder"), ("k3", "cast")],
        [("conv", "Conv"), ("p1", "copy"), ("p2", "reorder")],
    )
    # k1 runs before the convolution, where the pruned model has nothing
    assert rows == [("k1", 1, None), ("conv", 2, 1), ("p1", None, 2), ("k2", 3, 3), ("k3", 4, None)]


def test_every_layer_is_in_the_table_once() -> None:
    rows = table([("a", "x"), ("b", "y")], [("c", "z"), ("b", "y"), ("d", "x"), ("e", "w")])
    assert [row for row in rows if row[1] is not None] == [("a", 1, None), ("b", 2, 2)]
    assert [row for row in rows if row[1] is None] == [("c", None, 1), ("d", None, 3), ("e", None, 4)]
    assert table([], []) == []
    assert table([("", "x")], [("", "y")]) == [("", 1, None), ("", None, 1)]
