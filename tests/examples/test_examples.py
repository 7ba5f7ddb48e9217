"""The examples do what they say: the notebook runs from start to end, and the scripts work with what it made."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm

from upvits.calib_data import write_imagefolder

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
nbclient = pytest.importorskip("nbclient", reason="the Python package nbclient is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("examples")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the notebook ran."""
    import nbformat

    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(EXAMPLES / "demo.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return folder


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


def test_the_notebook_makes_a_report_and_a_package(made: Path) -> None:
    report = json.loads((made / "runs/notebook/report.json").read_text(encoding="utf-8"))
    assert report["pruned"]["params"] < 0.3 * report["dense"]["params"]
    assert report["pruned"]["top1"] > 90  # compensated; plain deletion has 38
    assert (made / "runs/notebook/report.html").is_file()
    assert (made / "runs/notebook-package/MODEL_CARD.md").is_file()


def test_the_server_recognises_pictures(made: Path) -> None:
    write_imagefolder(made / "pictures", "val", 12, 64)
    pictures = sorted((made / "pictures/val").rglob("*.png"))
    with serving(made / "runs/notebook-package") as address:
        answers = [post(address, picture.read_bytes())["classes"] for picture in pictures]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(address, b"no picture")
        with pytest.raises(urllib.error.HTTPError, match="413"):
            post(address, b"")
    right = [answer[0]["label"] == picture.parent.name for answer, picture in zip(answers, pictures, strict=True)]
    assert sum(right) >= 11
    assert sum(part["probability"] for part in answers[0]) <= 1.0001


@contextmanager
def serving(package: Path) -> Iterator[str]:
    """The address of a server on a package."""
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(package), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[0]
        finally:
            server.terminate()


def post(address: str, body: bytes) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, data=body, method="POST"), timeout=60) as answer:
        return json.load(answer)


def test_a_network_of_ones_own_is_pruned_and_saved(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_model.py"), "--images", "48", "--no-fine-tuning"]
    result = subprocess.run(
        [*command, "--out", "small"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "3,412,844 parameters became 871,868" in result.stdout
    assert float(result.stdout.split("became")[2].split()[0]) > 95  # plain deletion has 38
    model = timm.create_model(f"local-dir:{tmp_path}/small", pretrained=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 871_868
    assert (tmp_path / "small/model.onnx").is_file()
