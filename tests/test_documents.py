"""What the documents tell a reader to type works, what they point to is there, and what is generated is up to date."""

import ast
import pkgutil
import re
import shlex
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import upvits
from docs import reference
from upvits.calib_data import errors
from upvits.toolchain.families import Family

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
VERBS = {
    "build", "score", "plan", "prune", "distill", "export", "quantize", "engine", "bench", "report", "package",
    "recipe", "sweep", "models", "doctor", "predict", "inspect",
    "detect train", "detect compare", "detect eval", "detect export", "detect prune",
}  # fmt: skip

GENERAL = {"--version", "--help", "--install-completion"}
"""Options of no command."""


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), flags=re.DOTALL | re.MULTILINE)


def typed_commands(document: str) -> list[list[str]]:
    """Every `upvits-deploy ...` line of a document, in fences, indented, or between backticks, as words."""
    text = text_of(document).replace("\\\n", " ")
    lines = [*re.findall(r"`(upvits-deploy [^`]+)`", text), *re.findall(r"^\s*(upvits-deploy .+)$", text, re.MULTILINE)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if "[OPTIONS]" not in line and "COMMAND" not in line]  # how a command is used


@cache
def commands() -> dict[str, Any]:
    """Commands by name, those of groups by both names."""
    return dict(reference.commands())


@cache
def options(verb: str) -> set[str]:
    return {name for parameter in commands()[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_the_command_line_has_the_agreed_verbs() -> None:
    assert set(commands()) == VERBS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_the_documents_can_be_typed(document: str) -> None:
    for _, *words in typed_commands(document):
        if words[0].startswith("-"):
            assert words[0] in GENERAL
            continue
        verb, arguments = (words[0], words[1:]) if words[0] != "detect" else (" ".join(words[:2]), words[2:])
        assert verb in VERBS
        if arguments:
            commands()[verb].make_context(verb, list(arguments)).close()  # parses options and their values


def test_the_documents_have_commands() -> None:
    assert sum(len(typed_commands(document)) for document in DOCUMENTS) >= 20


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
        first, second, *_ = asked.training_script_args
        verb = f"{first} {second}"
        assert set(words) <= options(verb if verb in commands() else first)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith("benchmarks/")])
def test_every_option_that_a_document_names_exists(document: str) -> None:
    known = set().union(*(options(verb) for verb in VERBS)) | GENERAL
    theirs = {"--strict"}  # of mkdocs and pytest
    named = set(re.findall(r"`(--[a-z0-9-]+)", text_of(document)))
    assert named <= known | theirs


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_option_says_what_it_does(verb: str) -> None:
    assert commands()[verb].help
    silent = [p.opts for p in commands()[verb].params if p.param_type_name == "option" and not p.help]
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


PYTHON = [
    pytest.param(block, id=f"{document}-{number}")
    for document in DOCUMENTS
    for number, block in enumerate(blocks(document, "python"), start=1)
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_in_the_documents_works(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run, on few images. Those about a whole run compile, and what they import and name of ours is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(upvits, "calibration_images", partial(upvits.calibration_images, num_images=64))
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "upvits":
            assert node.attr in upvits.__all__
    if "runs/" in block:
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(tree, "block", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_ours_exist(document: str) -> None:
    """`upvits.toolchain.load` and the like, between backticks."""
    for name in re.findall(r"`(upvits(?:\.[A-Za-z_]+)+)[`(]", text_of(document)):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_folders_that_are_named_are_there(document: str) -> None:
    pattern = r"`((?:calib_data|toolchain|detection|deploy|docs|examples|benchmarks|tests|\.ci|\.github)/[^`\s(]*)`"
    named = [path for path in re.findall(pattern, text_of(document)) if "NAME" not in path]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text_of(document)):
        place = (ROOT / document).parent / target if target else ROOT / document
        assert place.exists(), target
        if anchor:
            assert anchor in {slug(title) for title in headings(place.read_text(encoding="utf-8"))}


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")


def test_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \| .+ \| .+ \| `(\w+)` \|$", text_of("docs/troubleshooting.md"), flags=re.MULTILINE)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    assert {name: int(code) for code, name in rows} == {kind.__name__: kind.exit_code for kind in kinds}


@pytest.mark.parametrize("page", sorted(reference.pages()))
def test_the_reference_is_up_to_date(page: str) -> None:
    assert text_of(f"docs/{page}") == reference.pages()[page], "options changed: run `make reference`"


def test_every_public_name_is_documented() -> None:
    assert set(re.findall(r"^::: upvits\.(\w+)$", text_of("docs/python.md"), re.MULTILINE)) == set(upvits.__all__)


def test_adding_a_family_names_every_function_of_one() -> None:
    table = (ROOT / "docs/extending.md").read_text().partition("## A runtime")[0]
    functions = [name for name in vars(Family) if not name.startswith("_")]
    assert len(functions) > 9
    assert [name for name in functions if f"| `{name}(" not in table] == []


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 900


def test_no_figure_is_still_to_be_measured() -> None:
    assert [document for document in DOCUMENTS if "TO MEASURE" in text_of(document)] == []
