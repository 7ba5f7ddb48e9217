"""Doctor tells apart what works, what is not there and what is there and broken."""

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from upvits.deploy.machine import doctor as module
from upvits.deploy.machine.doctor import Check, doctor, installed, render


def lines(checks: list[Check]) -> list[str]:
    console = Console(width=80, record=True, quiet=False, color_system=None)
    with console.capture() as captured:
        console.print(render(checks))
    return captured.get().splitlines()


@pytest.fixture(scope="module")
def here() -> list[Check]:
    return doctor()


def test_on_this_machine_the_core_works(here: list[Check]) -> None:
    ok = {check.name for check in here if check.status == "ok"}
    assert {"Python", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxslim", "onnx-graphsurgeon"} <= ok
    assert ok & {"onnxruntime", "onnxruntime-gpu"}
    assert next(check.found for check in here if check.name == "torch") == installed("torch")


def test_everything_that_is_missing_comes_with_a_way_to_get_it(here: list[Check]) -> None:
    assert [check.name for check in here if check.status != "ok" and not check.fix] == []
    assert {check.status for check in here if installed(check.name) is None and check.name == "mmdet"} <= {"missing"}


def test_the_table_fits_80_columns_and_names_every_check(here: list[Check]) -> None:
    text = lines(here)
    assert max(map(len, text)) <= 80
    for check in here:
        assert any(check.name in line for line in text)


def test_a_problem_is_shown_first_with_its_remedy() -> None:
    checks = [
        Check("torchvision", "problem", "0.28.0, but: operator nms does not exist", "transforms", "reinstall both"),
        Check("mmdet", "missing", "not installed", "detection", "pip install it"),
    ]
    text = "\n".join(lines(checks))
    assert text.index("Mend") < text.index("- torchvision: reinstall both") < text.index("- mmdet: pip install it")
    assert "The main job can run here" not in text
    assert "The main job can run here" in "\n".join(lines(checks[1:]))


def package(probe: str, name: str = "pytest") -> Any:
    return module._Package(name, "tests", probe, "reinstall it")


@pytest.mark.parametrize(
    ("probe", "trouble"),
    [
        ("raise ImportError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("import os; os.kill(os.getpid(), 11)", "crashes when it is loaded (SIGSEGV)"),
        ("import os; os._exit(3)", "ends the process with code 3"),
        ("import sys; sys.exit('go away')", "SystemExit: go away"),
    ],
)
def test_a_package_that_does_not_load_is_a_problem_and_the_others_are_not(probe: str, trouble: str) -> None:
    before, broken, after = module._packages(
        [package("print('hello')", "rich"), package(probe), package("import numpy", "numpy")]
    )
    assert (before.status, broken.status, after.status) == ("ok", "problem", "ok")
    assert trouble in broken.found
    assert broken.fix == "reinstall it"


def test_a_package_that_hangs_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_TO_LOAD", 2)
    (check,) = module._packages([package("import time; time.sleep(30)")])
    assert "does not load within 2 s" in check.found


def test_a_file_of_the_user_named_like_a_library_does_not_confuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytest.py").write_text("raise RuntimeError('not the library')")
    monkeypatch.chdir(tmp_path)
    (check,) = module._packages([package("import pytest")])
    assert check.status == "ok"


def fake_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_both_onnxruntimes_at_once_are_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        fake_distribution(tmp_path, name, "1.99.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (check,) = module._onnxruntime()
    assert check.status == "problem"
    assert check.found == "both onnxruntime-gpu 1.99.0 and onnxruntime 1.99.0"
    assert "pip uninstall" in check.fix


def test_a_required_package_that_is_not_there_is_a_problem() -> None:
    missing = module._Package("no-such-distribution", "everything", "", "install it", required=True)
    expected = Check("no-such-distribution", "problem", "not installed", "everything", "install it")
    assert list(module._packages([missing])) == [expected]


def nvidia_smi(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_the_driver_is_what_its_tool_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._driver() is None
    nvidia_smi(tmp_path, "echo 'Imaginary GPU, 599.1'")
    assert module._driver() == "Imaginary GPU, 599.1"
    nvidia_smi(tmp_path, "echo 'has failed because it could not communicate'; exit 9")
    assert module._driver() is None


@pytest.mark.parametrize(
    ("printed", "status"), [("13.0 True", "ok"), ("None False", "missing"), ("13.0 False", "problem")]
)
def test_torch_is_held_against_the_driver(monkeypatch: pytest.MonkeyPatch, printed: str, status: str) -> None:
    monkeypatch.setattr(module, "_driver", lambda: "Imaginary GPU, 599.1")
    monkeypatch.setattr(module, "_python_process", lambda code, *_: (printed + "\n", ""))
    driver, torch = module._gpu()
    assert driver.status == "ok"
    assert torch.status == status


def test_a_folder_that_does_not_exist_yet_is_on_the_disk_above_it(tmp_path: Path) -> None:
    disk = next(check for check in module._machine(tmp_path / "runs" / "new") if check.name == "disk")
    assert disk.found.endswith("GB free")
    assert not (tmp_path / "runs").exists()
