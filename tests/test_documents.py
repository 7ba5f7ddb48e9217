"""What the documents tell a reader to type exists, and what they point to is there."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from torch.distributed.run import get_args_parser
from typer.main import get_command

from upvits.deploy.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/coco.md")
VERBS = {
    "build", "score", "plan", "prune", "distill", "export", "quantize", "engine", "bench", "report", "package",
    "sweep", "models", "doctor", "detect train", "detect compare", "detect eval", "detect export", "detect prune",
}  # fmt: skip


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), flags=re.DOTALL | re.MULTILINE)


def typed_commands() -> list[list[str]]:
    """Every `upvits-deploy ...` line of the documents, in fences, indented, or between backticks, as words."""
    found = []
    for document in DOCUMENTS:
        text = text_of(document)
        lines = [
            *re.findall(r"`(upvits-deploy [^`]+)`", text),
            *re.findall(r"^\s*(upvits-deploy .+)$", text, re.MULTILINE),
        ]
        found += [shlex.split(line, comments=True) for line in lines]
    return found


def commands() -> dict[str, click.Command]:
    """Commands by name, those of groups by both names."""
    group: Any = get_command(app)
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", {})
        found |= {f"{name} {own}": one for own, one in inner.items()} if inner else {name: command}
    return found


def options(verb: str) -> set[str]:
    return {name for parameter in commands()[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_the_command_line_has_the_agreed_verbs() -> None:
    assert set(commands()) == VERBS


def test_every_command_in_the_documents_can_be_typed() -> None:
    lines = typed_commands()
    assert len(lines) >= 5
    for _, verb, *rest in lines:
        if verb == "detect":
            verb, rest = f"detect {rest[0]}", rest[1:]
        assert verb in VERBS
        assert {word for word in rest if word.startswith("-")} <= options(verb)


def test_torchrun_starts_what_the_documents_tell_it_to() -> None:
    text = "".join(text_of(document) for document in DOCUMENTS).replace("\\\n", " ")
    lines = re.findall(r"^(torchrun .+)$", text, re.MULTILINE) + re.findall(r"`(torchrun [^`]+)`", text)
    started = [get_args_parser().parse_args(shlex.split(line, comments=True)[1:]) for line in lines]
    ours = [asked for asked in started if asked.training_script == "upvits"]
    assert len(ours) >= 3
    for asked in ours:
        assert asked.module
        words = [word for word in asked.training_script_args if word.startswith("-")]
        assert words
        assert set(words) <= options(" ".join(asked.training_script_args[:2]))


def test_every_option_that_the_readme_names_exists() -> None:
    known = set().union(*(options(verb) for verb in VERBS)) | {"--version", "--help"}
    named = set(re.findall(r"`(--[a-z0-9-]+)", text_of("README.md")))
    assert len(named) >= 6
    assert named <= known


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_option_says_what_it_does(verb: str) -> None:
    assert commands()[verb].help
    silent = [p.opts for p in commands()[verb].params if isinstance(p, click.Option) and not getattr(p, "help", None)]
    assert silent == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = text_of(document)
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert named <= targets


def test_make_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)) - {"help", "setup"}
    assert set(re.findall(r'@echo "make ([a-z-]+)', makefile)) == targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_the_documents_parses_and_imports_what_exists(document: str) -> None:
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "upvits.deploy":
                from upvits import deploy

                assert {alias.name for alias in node.names} <= set(deploy.__all__)


def test_named_functions_of_the_toolchain_exist() -> None:
    from upvits import toolchain

    named = set(re.findall(r"`toolchain\.([a-z_]+)[`(]", text_of("README.md")))
    assert len(named) >= 5
    assert {name for name in named if not hasattr(toolchain, name)} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_folders_that_are_named_are_there(document: str) -> None:
    pattern = r"`((?:calib_data|toolchain|detection|deploy|benchmarks|tests|\.ci)/[^`\s(]*)`"
    missing = [path for path in re.findall(pattern, text_of(document)) if not (ROOT / path).exists()]
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(document))
    assert missing == []
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_exit_codes_are_those_of_the_errors() -> None:
    from upvits.calib_data import errors

    documented = {int(code) for code in re.findall(r"^\| (\d) \|", text_of("README.md"), flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    assert documented == {0} | {kind.exit_code for kind in kinds}


def test_no_figure_is_still_to_be_measured() -> None:
    assert [document for document in DOCUMENTS if "TO MEASURE" in text_of(document)] == []
