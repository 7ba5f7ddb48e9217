"""What every test runs under: few threads, no network, and the fixtures that more than one folder uses."""

import os

# Before torch, timm or a hub library is imported. Two OpenMP threads on a busy machine can be slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)

# Time limits per example only measure what else the machine is doing.
settings.register_profile("upvits", deadline=None, max_examples=50)
settings.load_profile("upvits")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real photographs next to the source tree (`../shared/data`), or a skip where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real photographs here: ../shared/data is absent")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, so that no worker is left alone with them; `gpu` is skipped where torch sees none."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
