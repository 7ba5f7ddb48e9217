"""The commands of benchmarks/imagenet.md give networks of the published sizes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from upvits import toolchain
from upvits.toolchain.networks.depth import last_blocks_first

PAGE = Path("benchmarks/imagenet.md").read_text(encoding="utf-8")
COMMANDS = dict.fromkeys(re.findall(r"--model (\w+)[^`]*?--like (\w+) --train-recipe up", PAGE))
"""Parent and smaller network of every command."""

ROWS = {
    name: (float(params), float(gmacs)) for name, params, gmacs in re.findall(r"\| UP-(\S+) \| (\S+) \| (\S+) \|", PAGE)
}
"""Millions of parameters and GMACs at 224 pixels."""

NAMES = {"deit_tiny": "DeiT-T", "deit_small": "DeiT-S", "pvtv2_b0": "PVTv2-B0", "pvtv2_b1": "PVTv2-B1"}


def test_every_network_of_the_table_has_a_command() -> None:
    assert {NAMES[smaller] for _, smaller in COMMANDS} == set(ROWS)


@pytest.mark.parametrize(("parent", "smaller"), COMMANDS)
def test_plans_have_the_published_sizes(parent: str, smaller: str) -> None:
    dense, like = (toolchain.create_model(name) for name in (parent, smaller))
    scores = replace(toolchain.score(dense, method="random"), depth=last_blocks_first(dense))
    plan = toolchain.plan(dense, scores, like=like)
    params, gmacs = ROWS[NAMES[smaller]]
    assert plan.after.params == toolchain.count_params(like)
    assert plan.after.params / 1e6 == pytest.approx(params, abs=0.05)
    assert plan.after.macs / 1e9 == pytest.approx(gmacs, abs=0.005)
