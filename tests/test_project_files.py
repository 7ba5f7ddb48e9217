"""Files for other tools: they name what exists, and fetch nothing that is not agreed."""

import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs import reference
from upvits.deploy.store.run_dir import read_toml

ROOT = Path(__file__).resolve().parents[1]
yaml = pytest.importorskip("yaml", reason="the Python package pyyaml is not installed")


def document(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def dockerfile() -> dict[str, list[list[str]]]:
    """Instructions of the Dockerfile, by name."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found: dict[str, list[list[str]]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, rest = line.split(maxsplit=1)
            found.setdefault(name, []).append(
                [str(word) for word in yaml.safe_load(rest)] if rest.startswith("[") else shlex.split(rest)
            )
    return found


def test_the_container_starts_a_command_that_exists() -> None:
    entry, arguments = dockerfile()["ENTRYPOINT"][0], dockerfile()["CMD"][0]
    assert entry == ["upvits-deploy"]
    dict(reference.commands())[arguments[0]].make_context(arguments[0], arguments[1:]).close()


def test_the_container_installs_from_what_it_copies(tmp_path: Path) -> None:
    for *sources, target in dockerfile()["COPY"]:
        for source in sources:
            place = tmp_path / target / source if target == "./" else tmp_path / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [source for *sources, _ in dockerfile()["COPY"] for source in sources]
    assert {f"!{source}" for source in copied} <= set(ignored)


def test_extras_that_are_installed_exist() -> None:
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    words = [word for line in dockerfile()["RUN"] for word in line if word.startswith(".[")]
    assert words
    assert {extra for word in words for extra in word[2:-1].split(",")} <= set(extras)


def test_the_workflow_runs_what_a_newcomer_runs() -> None:
    job = document(".github/workflows/ci.yml")["jobs"]["test"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & stat.S_IXUSR
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]


def test_hooks_before_a_commit_fetch_nothing() -> None:
    repositories = document(".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert [hook["entry"].split("/")[-1].split()[0] for hook in hooks] == ["ruff", "ruff", "mypy"]


def test_the_paper_can_be_cited() -> None:
    paper = document("CITATION.cff")["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Yu", "Wu"]
    assert paper["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")))
def test_forms_for_issues_ask_something(name: str) -> None:
    form = document(f".github/ISSUE_TEMPLATE/{name}")
    assert name == "config.yml" or all(part["attributes"]["label"] for part in form["body"])
