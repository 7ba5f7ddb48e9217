"""The wheel holds our packages and the demo data, and nothing else; its metadata names what a user needs."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("calib_data", "toolchain", "detection", "deploy")
# The same call that pip makes (PEP 517), in this environment: nothing is downloaded.
BUILD = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def sources() -> set[str]:
    """Every file of our packages that belongs into the wheel, under the one name that it is imported by."""
    belongs = {".py", ".html", ".css", ".js", ".jinja"}
    return {
        f"upvits/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if path.suffix in belongs or "demo_weights" in path.parts or path.name == "parameters.json"
    }


def test_the_wheel_holds_exactly_our_packages_and_the_demo_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    about = {name for name in inside if re.match(r"upvits_deploy-[^/]+\.dist-info/", name)}
    assert inside - about == sources() | {"upvits/__init__.py", "upvits/__main__.py", "upvits/py.typed"}
    assert {name.split("/", 1)[1] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_what_runs_need_beside_code_is_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        weights = [name for name in inside if name.startswith("upvits/calib_data/demo_weights/")]
        assert {Path(name).name for name in weights} >= {"model.safetensors", "config.json"}
        assert sum(archive.getinfo(name).file_size for name in weights) < 10_000_000
    assert "upvits/deploy/templates/report.html" in inside


def test_the_wheel_runs_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from upvits.deploy.cli import app; print(app.__file__); app.app(['build', '--help'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    module, _, help_text = result.stdout.partition("\n")
    assert Path(module) == tmp_path / "site/upvits/deploy/cli/app.py"
    assert "--ratio" in help_text


def test_the_command_exists_and_is_callable(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        points = configparser.ConfigParser()
        points.read_string(archive.read(name).decode())
    assert dict(points["console_scripts"]) == {"upvits-deploy": "upvits.__main__:run"}
    module, _, function = points["console_scripts"]["upvits-deploy"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", {"onnxruntime-gpu"}),
        ("win32", "AMD64", {"onnxruntime-gpu"}),
        ("linux", "aarch64", {"onnxruntime"}),
        ("darwin", "arm64", {"onnxruntime"}),
        ("darwin", "x86_64", {"onnxruntime"}),
    ],
)
def test_exactly_one_onnxruntime_everywhere(metadata: Message, system: str, machine: str, expected: set[str]) -> None:
    place = {"sys_platform": system, "platform_machine": machine, "extra": ""}
    chosen = set()
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.name.startswith("onnxruntime") and requirement.marker and requirement.marker.evaluate(place):
            chosen.add(requirement.name)
    assert chosen == expected


def test_optional_libraries_stay_in_extras(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra") or []) == {
        "tensorrt",
        "tensorrt-rtx",
        "openvino",
        "detection",
        "heif",
        "dev",
        "docs",
    }
    core = {
        requirement.name
        for requirement in map(Requirement, metadata.get_all("Requires-Dist") or [])
        if requirement.marker is None or "extra" not in str(requirement.marker)
    }
    assert {"torch", "timm", "onnx", "safetensors"} <= core
    assert core.isdisjoint({"tensorrt", "tensorrt-rtx", "nvidia-modelopt", "mmdet", "mmcv", "openvino", "pytest"})


def test_every_core_requirement_is_pinned_and_nothing_names_an_address(metadata: Message) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pattern = re.compile(r"[a-z0-9][a-z0-9._-]*==[^\s;@/]+( ; python_version [<>=]=.*)?")
    assert [line for line in lines if not pattern.fullmatch(line)] == []
    for version in ("3.10", "3.11", "3.12", "3.13"):
        pins = [Requirement(line) for line in lines]
        here = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": version})]
        assert len(here) == len(set(here))
        wanted = {
            requirement.name
            for requirement in map(Requirement, metadata.get_all("Requires-Dist") or [])
            if requirement.marker is None
            or requirement.marker.evaluate(
                {
                    "python_version": version,
                    "sys_platform": "linux",
                    "platform_machine": "x86_64",
                    "extra": "tensorrt-rtx",
                }
            )
        }
        assert wanted <= set(here)
