"""Runs a command where it cannot do harm, and says what was wrong with how it ended."""

from __future__ import annotations

import importlib
import os
import pkgutil
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.robustness.case import Case, Ground, Outcome

DOCUMENTED = (0, 2, 3, 4, 5, 6)
"""Exit codes that are right; 70, an error of the tool itself, is documented and wrong."""

_CPU_SECONDS, _IDLE_SECONDS, _BYTES = 60.0, 60.0, 3_500_000_000
_ROOMS = ("calib_data", "toolchain", "deploy")
_LATE = ("torch.export", "torch.onnx._internal.exporter._core", "onnxscript", "onnxslim", "onnx_graphsurgeon",
         "onnxruntime", "torchvision", "timm", "jinja2", "filelock")  # fmt: skip


def import_everything() -> None:
    """Import what commands import, so that a fork of this process starts at once."""
    for room in _ROOMS:
        for module in pkgutil.walk_packages(importlib.import_module(f"upvits.{room}").__path__, f"upvits.{room}."):
            importlib.import_module(module.name)
    for name in _LATE:
        importlib.import_module(name)


def outcome_of(case: Case, ground: Ground) -> Outcome:
    """Run a case in its own folder."""
    for folder in (ground.case, ground.temporary):
        _remove(folder)
        folder.mkdir()
    arguments = [os.fsdecode(argument) for argument in case.arrange(ground.case)]
    streams = (ground.work / "output", ground.work / "errors")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(case, ground, arguments, streams)
    return _watched(child, ground, streams)


def _become(case: Case, ground: Ground, arguments: Sequence[str], streams: tuple[Path, Path]) -> None:
    """Turn the fork into the command; never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(ground.case)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        given = {"HOME": str(ground.home), "TMPDIR": str(ground.temporary), "OMP_NUM_THREADS": "1", **case.environment}
        for name, value in given.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for kind, most in case.limits:
            resource.setrlimit(kind, (most, most))
        if case.shell:
            command = str(Path(sys.executable).with_name("upvits-deploy"))
            os.execv("/bin/bash", ["bash", "-c", case.shell, "case", command, *arguments])
        code = _in_this_process(case, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _in_this_process(case: Case, arguments: Sequence[str]) -> int:
    import tempfile

    from upvits.deploy.cli.app import main

    tempfile.tempdir = None
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = ["upvits-deploy", *arguments]
    if case.hook is not None:
        case.hook()
    try:
        main()
    except SystemExit as ended:
        sys.stdout.flush()
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _watched(child: int, ground: Ground, streams: tuple[Path, Path]) -> Outcome:
    """Wait for a command; stop it when it takes too much, or does nothing."""
    stopped, used, used_at = "", 0.0, time.monotonic()
    process = psutil.Process(child)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        with suppress(psutil.Error):
            family = [process, *process.children(recursive=True)]
            now = sum(sum(member.cpu_times()[:2]) for member in family)
            if now > used + 0.05:
                used, used_at = now, time.monotonic()
            if used > _CPU_SECONDS:
                stopped = f"still at work after {_CPU_SECONDS:.0f} s of CPU"
            elif time.monotonic() - used_at > _IDLE_SECONDS:
                stopped = f"hangs: nothing happened for {_IDLE_SECONDS:.0f} s"
            elif sum(member.memory_info().rss for member in family) > _BYTES:
                stopped = f"takes more than {_BYTES / 1e9:.1f} GB"
        if stopped:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    with suppress(ProcessLookupError):  # what it started may not outlive it
        os.killpg(child, signal.SIGKILL)
    reports = [path.read_text(errors="replace") for path in ground.temporary.glob("upvits-deploy-error-*.txt")]
    return Outcome(
        code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status),
        output=streams[0].read_text(errors="backslashreplace"),
        errors=streams[1].read_text(errors="backslashreplace"),
        cpu=usage.ru_utime + usage.ru_stime,
        stopped=stopped,
        report="\n".join(reports),
    )


def judged(case: Case, outcome: Outcome, ground: Ground) -> list[str]:
    """Everything that is wrong with how a case ended, in words."""
    wrong = [outcome.stopped] if outcome.stopped else _ending(case, outcome)
    text = outcome.output + outcome.errors
    if "Traceback (most recent call last)" in text:
        wrong.append("a traceback")
    if "\x1b" in text:
        wrong.append("a control character reaches the terminal")
    if outcome.code in DOCUMENTED[1:] and not case.shell and not outcome.errors.strip():
        wrong.append("no message")
    if outcome.errors.count("\nError: ") + outcome.errors.startswith("Error: ") > 1:
        wrong.append("more than one message")
    try:
        wrong += case.check(ground.case, outcome)
    except Exception as error:
        wrong.append(f"cannot be checked: {type(error).__name__}: {error}")
    return wrong + touched(ground, ended=not outcome.stopped and outcome.code >= 0)


def _ending(case: Case, outcome: Outcome) -> list[str]:
    if outcome.code < 0:
        return [f"ended by signal {-outcome.code}"]
    if outcome.code not in (*DOCUMENTED, *case.codes):
        return [f"exit code {outcome.code}"]
    if case.expect == "refused" and outcome.code == 0:
        return ["was accepted"]
    if case.expect == "done" and outcome.code != 0:
        return [f"was refused with {outcome.code}"]
    return []


def touched(ground: Ground, *, ended: bool = True) -> list[str]:
    """What a command did where it has no business; put right again. One that was killed may leave temporary files."""
    wrong = []
    if any(ground.work.rglob(ground.marker.name)):
        wrong.append("A PAYLOAD RAN")
        for path in ground.work.rglob(ground.marker.name):
            path.unlink()
    notes = ground.precious / "notes.txt"
    if [path.name for path in ground.precious.iterdir()] != [notes.name] or notes.read_text() != "mine":
        wrong.append("A FILE OUTSIDE CHANGED")
        _remove(ground.precious)
        ground.precious.mkdir()
        notes.write_text("mine")
    known = {"case", "precious", "tmp", "home", "given", "output", "errors", "disk"}
    if new := sorted(path.name for path in ground.work.iterdir() if path.name not in known):
        wrong.append(f"made outside of its folder: {new}")
        for name in new:
            _remove(ground.work / name)
    if ended and (left := sorted(path.name for path in ground.temporary.iterdir() if "error-" not in path.name)):
        wrong.append(f"left in TMPDIR: {left[:3]}")
    return wrong


def drafts_in(folder: Path) -> list[str]:
    """What a command had in the making and did not clear away."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(name for name in names if name.endswith(".tmp") or ".work-" in name or name.endswith(".lock.json"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
