"""The commands of benchmarks/imagenet.md give networks of the published sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from upvits import toolchain
from upvits.toolchain.networks.depth import last_blocks_first

PUBLISHED = {
    ("deit_base", "deit_tiny"): (5.7, 1.25),
    ("deit_base", "deit_small"): (22.1, 4.60),
    ("pvtv2_b1", "pvtv2_b0"): (3.7, 0.57),
    ("pvtv2_b2", "pvtv2_b1"): (14.0, 2.11),
}
"""Millions of parameters and GMACs at 224 pixels."""


@pytest.mark.parametrize(("parent", "smaller"), PUBLISHED)
def test_plans_have_the_published_sizes(parent: str, smaller: str) -> None:
    dense, like = (toolchain.create_model(name) for name in (parent, smaller))
    scores = replace(toolchain.score(dense, method="random"), depth=last_blocks_first(dense))
    plan = toolchain.plan(dense, scores, like=like)
    params, gmacs = PUBLISHED[parent, smaller]
    assert plan.after.params == toolchain.count_params(like)
    assert plan.after.params / 1e6 == pytest.approx(params, abs=0.05)
    assert plan.after.macs / 1e9 == pytest.approx(gmacs, abs=0.005)
