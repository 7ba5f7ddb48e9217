"""mmdet that is absent or of another version is said before anything starts, with exit code 3."""

import importlib.util
from json import dumps
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.installation import install_line
from upvits.deploy.cli.app import app
from upvits.detection import configs, openmm

GOOD = {"mmdet": "3.3.0", "mmengine": "0.10.7", "mmcv-lite": "2.1.0"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all packages were installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mmcv-lite": "2.2.0"}, "mmcv-lite 2.2.0"),
        ({"mmdet": "2.28.2"}, "mmdet 2.28.2"),
        ({"mmengine": "1.0.0"}, "mmengine 1.0.0"),
        ({"mmcv": "2.1.0"}, "Both mmcv and mmcv-lite"),
    ],
)
def test_versions_that_do_not_fit(change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmm, "versions", lambda: GOOD)
    assert openmm.missing() is None
    monkeypatch.setattr(openmm, "versions", lambda: {**GOOD, **change})
    fault = openmm.missing()
    assert isinstance(fault, MissingDependencyError)
    assert message in fault.what
    assert fault.fix.startswith("Run: pip")


def test_absent_packages_end_with_exit_code_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec

    def without_mmdet(name: str, package: str | None = None) -> Any:
        return None if name == "mmdet" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_mmdet)
    openmm._loaded.cache_clear()
    for command in (
        ["train", "--run", str(tmp_path)],
        ["eval", str(tmp_path)],
        ["prune", str(tmp_path), "-o", "x", "--ratio", "0.5"],
    ):
        config = configs.retinanet({"type": "UPPVTv2", "model": {"architecture": "pvt_v2_b0"}}, [64, 160, 256], 1)
        document = {"config": config, "classes": ["a"], "category_ids": [1], "scale": [64, 64]}
        (tmp_path / "detector.json").write_text(dumps(document))
        with pytest.raises(UserError) as caught:
            CliRunner().invoke(app, ["detect", *command], catch_exceptions=False)
        assert caught.value.exit_code == 3, command
        assert caught.value.fix == f"Run: {install_line('detection')}"
    openmm._loaded.cache_clear()
