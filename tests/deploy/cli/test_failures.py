"""Whatever goes wrong, a command ends with one message and an exit code; what it prints is plain text."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.table import Table
from rich.text import Text

from upvits.calib_data.cache import cache_folder
from upvits.calib_data.errors import UserError
from upvits.deploy.cli import app as cli
from upvits.deploy.cli.console import console, prepare_streams, print_json
from upvits.deploy.cli.failures import INTERNAL, exit_code_of

PLAN = ("plan", "--model", "pvtv2_b0", "--ratio", "0.5")


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of the entry point."""
    monkeypatch.setattr("sys.argv", ["upvits-deploy", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    """What one command logs is no business of the next: a process usually has one command."""
    logger = logging.getLogger("upvits")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Lets the command `models` end in this error."""

    def fail(pattern: str) -> None:
        raise error

    monkeypatch.setattr("upvits.toolchain.networks.catalogue.architectures", fail)


def test_an_error_of_the_tool_is_one_message_and_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broken(monkeypatch, KeyError("\x1b[31mred"))
    code, said = run(capsys, monkeypatch, "models", "pvt")
    assert code == INTERNAL == 70
    assert "Error: This is an error of upvits-deploy" in said
    assert "Traceback" not in said
    assert "\x1b" not in said
    (written,) = tmp_path.glob("upvits-deploy-error-*.txt")
    assert str(written) in said
    text = written.read_text()
    assert "upvits-deploy models pvt" in text
    assert "Traceback (most recent call last)" in text
    assert re.search(r"^torch \d", text, flags=re.MULTILINE)


def test_the_traceback_is_shown_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    monkeypatch.setenv("UPVITS_LOG", "debug")
    broken(monkeypatch, ValueError("no"))
    code, said = run(capsys, monkeypatch, "models")
    assert code == INTERNAL
    assert "Traceback (most recent call last)" in said
    assert "--verbose" in said  # there is no place for the file


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (RuntimeError("Symlink loop from '/x/l'"), "in a circle"),
        (MemoryError(), "Memory runs out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "Memory runs out"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "Memory runs out"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "Memory runs out"),
        (UnicodeEncodeError("utf-8", "ph\udce9tos", 2, 3, "surrogates not allowed"), "UTF-8"),
        (RuntimeError("Path a\ufffd is not valid UTF-8"), "UTF-8"),
        (ValueError("unable to parse raw data as a unicode string"), "UTF-8"),
        (TypeError("InferenceSession(arg0: '/ph\udce9tos/model.onnx')"), "UTF-8"),
        (TypeError(r"InferenceSession(arg0: '/ph\udce9tos/model.onnx')"), "UTF-8"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "ulimit -f"),
        (UserError("mine", why="because"), "because"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_machine_or_its_user_can_mend_is_no_error_of_the_tool(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "upvits")  # tracebacks with names that are no text break pytest's own reports
    assert exit_code_of(error, ()) == 2
    assert words in capsys.readouterr().err


def test_too_little_address_space_is_said_before_libraries_crash() -> None:
    command = f"ulimit -v 4000000; exec {sys.executable} -m upvits --help"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "ulimit -v unlimited" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_user_without_a_home_folder_is_told_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "UPVITS_DEPLOY_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match="no home folder"):
        cache_folder()
    monkeypatch.setenv("UPVITS_DEPLOY_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")


def nobody() -> Path:
    """What pathlib says of a user that the system does not know."""
    raise RuntimeError("Could not determine home directory.")


def test_a_deleted_working_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, said = run(capsys, monkeypatch, "models")
    assert code == 2
    assert "working folder" in said


@pytest.mark.parametrize("device", ["/dev/full", "closed"])
def test_a_standard_output_that_takes_nothing(device: str) -> None:
    command = [sys.executable, "-m", "upvits", "recipe", "--schema"]
    if device == "closed":
        ended = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
        return
    with Path(device).open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: ")
    assert "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_a_standard_error_that_takes_nothing() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-m", "upvits", "report", "/nonexistent"], stderr=full)
    assert ended.returncode == 2


def test_a_terminal_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    prepare_streams()
    console().print("\N{MINUS SIGN}0.5 caf\u00e9 \U0001f4a5", highlight=False)
    print_json(json.dumps({"name": "caf\u00e9"}, ensure_ascii=False))
    terminal.flush()
    shown, document = terminal.buffer.getvalue().decode("ascii").splitlines()
    assert shown == r"-0.5 caf\u00e9 \ud83d\udca5"
    assert json.loads(document) == {"name": "caf\u00e9"}


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("class\x1b]0;title\x07")
    table.add_row(Text("\x1b[31mred\x9b\u202e"))
    console().print(table, "\x1b[2J", markup=False)
    print_json('{"class": "\x9b31m\x7f"}')
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x07\x9b\u202e\x7f")
    assert "?[31mred" in shown
    assert '"\\u009b31m\\u007f"' in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*PLAN, "--weights", ""), "--weights is empty"),
        ((*PLAN, "--data", " "), "--data is empty"),
        ((*PLAN, "--weights", "~nosuchuser/x"), "unknown user"),
        ((*PLAN, "--weights", "random", "--data", "imagefolder:~nosuchuser/x"), "unknown user"),
        ((*PLAN, "--weights", "a" * 300), "File name too long"),
        ((*PLAN, "--batch", "1:\u00b2:3"), "not valid"),
        ((*PLAN, "--batch", "1:2:3:4"), "not valid"),
        ((*PLAN, "--bench-batches", "\u00b2"), "not valid"),
        ((*PLAN, "--bench-batches", "1" * 5000), "not valid"),
        (("plan", "--recipe", "a" * 300), "File name too long"),
        (("plan", "--recipe", "~nosuchuser/x"), "unknown user"),
        (("plan", "--recipe", "pipe"), "no regular file"),
        (("plan", "--recipe", "/dev/zero"), "no regular file"),
        (("plan", "--recipe", "loop"), "cannot be read"),
        (("bench", "pipe"), "nothing that can be measured"),
        (("bench", "device.onnx"), "nothing that can be measured"),
        (("bench", "loop"), "cannot be read"),
        (("bench", "a" * 300), "File name too long"),
        (("bench", "x.onnx", "--threads", "100000"), "100000 threads"),
        (("bench", "x.onnx", "--batches", "\u00b2"), "not valid"),
        (("bench", "x.onnx", "--input-shape", "x=\u00b2x4"), "not valid"),
        (("bench", "x.onnx", "--output", "pipe"), "holds no comparison"),
        (("detect", "train", "--run", "x", "--scale", "\u00b2x3"), "not valid"),
        ((*PLAN, "--weights", "pipe"), "no regular file"),
        ((*PLAN, "--weights", "device.onnx"), "no regular file"),
    ],
    ids=lambda value: " ".join(part[:20] for part in value[-2:]) if isinstance(value, tuple) else "",
)
def test_odd_values_end_in_one_message(
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("device.onnx").symlink_to("/dev/zero")
    Path("x.onnx").write_bytes(b"")
    code, said = run(capsys, monkeypatch, *arguments)
    assert code == 2, said
    assert words in said.replace("\n", " ")
    assert said.count("Error:") == 1


@pytest.mark.parametrize("name", ["upvits.deploy.cli.app", "typer", "pydantic", "rich.console"])
def test_an_interruption_while_the_command_is_imported_is_one_line(name: str) -> None:
    code = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *rest, **more):\n"
        "    if name == sys.argv[1]: raise KeyboardInterrupt\n"
        "    return real(name, *rest, **more)\n"
        "from upvits.__main__ import run\n"
        "builtins.__import__ = interrupted\n"
        "run()"
    )
    ended = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "Interrupted.\n")
