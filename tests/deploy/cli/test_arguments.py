"""The same error names arguments in Python and options on the command line."""

import ast
import re
from pathlib import Path

import pytest

from tests.deploy.cli.test_cli import PLAN, run
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.cli.app import app
from upvits.deploy.cli.arguments import OTHER_NAMES, as_options, options_of, refuse_empty

LIBRARY = ("calib_data", "toolchain", "detection")
ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)=")
OPTIONS = options_of(app)


def strings_of(room: Path) -> list[tuple[str, str]]:
    """(where, text) of every string of a room that is no docstring."""
    found = []
    for path in sorted(room.rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append((f"{path}:{node.lineno}", node.value))
    return found


@pytest.mark.parametrize("room", LIBRARY)
def test_the_library_names_no_option(room: str, repository: Path) -> None:
    assert [where for where, text in strings_of(repository / room) if re.search(r"(^|[\s(`'])--[a-z]", text)] == []


@pytest.mark.parametrize("room", LIBRARY)
def test_every_argument_that_the_library_names_has_an_option(room: str, repository: Path) -> None:
    named = {name for _, text in strings_of(repository / room) for name in ARGUMENT.findall(text)}
    # The command line always has images, and an option for every entry of a preprocessing.
    only_in_python = {"images", "compensate", "preprocess"}
    flags = {f"--{OTHER_NAMES.get(name, name).replace('_', '-')}" for name in named - only_in_python}
    assert flags <= OPTIONS


def test_one_error_said_twice(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        toolchain.create_model("deit_tiny", weights="demo")
    assert '`weights="timm"` for pretrained ones' in caught.value.fix
    code, _, err = run(capsys, monkeypatch, "plan", "--model", "deit_tiny", "--weights", "demo", "--ratio", "0.5")
    assert code == 2
    assert "--weights timm for pretrained ones" in err
    assert "`" not in err


def test_a_narrow_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = toolchain.create_model("pvtv2_b0", weights="demo")
    with pytest.raises(UserError) as caught:
        toolchain.plan(model, toolchain.score(model, method="random"), ratio=0.99)
    assert "smaller `align=`" in caught.value.fix
    code, _, err = run(capsys, monkeypatch, *PLAN, "--ratio", "0.99")
    assert code == 2
    assert "smaller --align." in err


def test_what_is_no_option_stays() -> None:
    assert as_options("Set `momentum=0.9` and `nothing=`.", OPTIONS) == "Set `momentum=0.9` and `nothing=`."


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["build", "--output", ""], "--output"),
        (["build", "--targets="], "--targets"),
        (["build", "-m", " "], "-m"),
        (["report", ""], "The argument"),
    ],
)
def test_an_empty_value_is_refused_whatever_the_option(arguments: list[str], name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is empty"):
        refuse_empty(arguments)
    refuse_empty(["build", "--model", "x", "--ratio=0.5", "--cfg-options", "a="])
