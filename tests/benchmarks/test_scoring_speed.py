"""The scoring benchmark: its sampling and its figures; the costs themselves are the machine's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scoring_speed import ranks_on, spread, summary
from tests.contracts.variants import VARIANTS, make, pictures
from upvits.toolchain.families import groups_of


def test_sampled_units_come_from_all_depths() -> None:
    groups = groups_of(make(VARIANTS[0]))
    total = sum(group.size for group in groups)
    chosen = spread(groups, total // 4)
    assert sum(len(units) for units in chosen.values()) == total // 4
    for group in groups:
        assert len(chosen.get(group.name, [])) == pytest.approx(group.size / 4, abs=1)
        assert all(0 <= unit < group.size for unit in chosen.get(group.name, []))


def test_ranks_and_summary() -> None:
    model, images = make(VARIANTS[0]), pictures(VARIANTS[0], 16)
    groups = [group for group in groups_of(model) if group.kind in ("heads", "attention")]
    found = ranks_on("small", model, torch.cat([images]), groups, batch_size=8, quiet=True)
    assert len(found["rows"]) == 2 * len(groups)
    heads = [row for row in found["rows"] if row["kind"] == "heads" and row["method"] == "refined"]
    assert all(row["overlap"] == 1 and row["spearman"] == 1 for row in heads)  # measured whole
    some = ranks_on("small", model, torch.cat([images]), groups, batch_size=8, quiet=True, every=2)
    assert some["rows"] == [row for row in found["rows"] if row["group"] in {group.name for group in groups[::2]}]
    assert some["seconds"]["kl"] > 0
    costs = [
        {"kl_speedup": 5.0, "fisher_speedup": 9.0, "network": "a"},
        {"kl_speedup": 4.5, "fisher_speedup": 99.0, "network": "b"},
    ]
    result = summary(costs, [found])
    assert (result["kl_speedup"], result["fisher_speedup"], result["fisher_speedup_on"]) == (4.5, 99.0, "b")
    assert result["refined_overlap_min"] == min(r["overlap"] for r in found["rows"] if r["method"] == "refined")
    assert result["refined_cost_share"] == pytest.approx(found["seconds"]["refined"] / found["seconds"]["kl"])
