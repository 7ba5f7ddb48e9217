"""Environment: read from the machine, complete, JSON."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import pytest

import upvits.deploy.machine.environment
from upvits.deploy.machine.environment import environment, usable_cores


@pytest.fixture(autouse=True)
def _fresh_cores() -> None:
    usable_cores.cache_clear()


def test_environment_names_this_machine() -> None:
    here = json.loads(json.dumps(environment().as_json()))
    assert here["python"] == platform.python_version()
    assert here["libraries"]["torch"] == importlib.metadata.version("torch")
    assert "timm" in here["libraries"]
    assert 1 <= here["cores_usable"] <= (os.cpu_count() or 1)
    assert here["memory_gib"] > 0.5
    assert here["cpu"]
    assert isinstance(here["gpus"], list)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is a matter of Linux")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_hyper_threads_and_container_limits_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(upvits.deploy.machine.environment, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(upvits.deploy.machine.environment, "_CGROUP_LIMIT", limit)
    assert usable_cores() == 4
    for text, cores in (("200000 100000", 2), ("max 100000", 4), ("50000 100000", 1), ("1600000 100000", 4)):
        limit.write_text(text)
        usable_cores.cache_clear()
        assert usable_cores() == cores
