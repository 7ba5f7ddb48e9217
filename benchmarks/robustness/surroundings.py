"""Terminals, disks, limits, names and neighbours that a command may meet: each case is a process of its own."""

from __future__ import annotations

import functools
import itertools
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from benchmarks.robustness.case import Arguments, Case, Ground, Outcome
from benchmarks.robustness.documents import SAME, of_run
from benchmarks.robustness.driver import drafts_in
from upvits.deploy.store.artifacts import file_digest

_HERE = '"$@"'
_NO_UTF8 = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
_VARIABLES: tuple[dict[str, str | None], ...] = (
    {"LC_ALL": "C"}, {**_NO_UTF8}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"TERM": "dumb"},
    {"COLUMNS": "1"}, {"COLUMNS": "abc"}, {"NO_COLOR": "1"}, {"TMPDIR": "/nonexistent"}, {"TMPDIR": "/proc"},
    {"UPVITS_DEPLOY_CACHE": "/proc/x"}, {"XDG_CACHE_HOME": "/dev/null"}, {"OMP_NUM_THREADS": "abc"},
    {"CUDA_VISIBLE_DEVICES": "99"}, {"WORLD_SIZE": "abc"}, {"PATH": ""}, {"HOME": None}, {"HOME": "/etc/passwd"},
    {"HOME": ""}, {"UPVITS_LOG": "nope"}, {"PYTHONWARNINGS": "error"}, {"TZ": "nope"}, {"HF_HOME": "/dev/null"},
)  # fmt: skip
_LINES = {
    "into head": "set -o pipefail; {} | head -1", "into true": "set -o pipefail; {} | true", "stdin closed": "{} <&-",
    "stdout closed": "{} >&-", "stderr closed": "{} 2>&-", "all closed": "{} <&- >&- 2>&-",
    "stdout full": "{} >/dev/full",
    "stderr full": "{} 2>/dev/full", "both full": "{} >/dev/full 2>&1", "stdin full of bytes": "{} </dev/urandom",
    "folder deleted": 'mkdir gone && cd gone && rmdir "$PWD" && {}',
    "umask 777": "umask 777; {}", "umask 0": "umask 0; {}",
    "stdout is a folder's file": "{} >x/y", "nice": "nice -n 19 {}",
}  # fmt: skip
_MB = 10**6


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """Everything around a command that can be strange."""
    for variables in _VARIABLES:
        name = ", ".join(f"{key}={value}" for key, value in variables.items())
        for command in random.sample(("report", "plan", "package", "bench"), 2):
            arrange = functools.partial(_on_run, ground, command, "run")
            yield Case(f"{name}: {command}", arrange, environment=variables, shell=_HERE)
    for what, line in _LINES.items():
        for command in ("report", random.choice(("plan", "package", "models", "missing"))):
            arrange = functools.partial(_on_run, ground, command, "run")
            codes = (1, 141) if what.startswith("into") or what == "stdout is a folder's file" else ()
            yield Case(f"{what}: {command}", arrange, shell=line.format(_HERE), codes=codes)
    names: tuple[str | bytes, ...] = (
        "\u00fcn\u00ef run",
        b"lat\xe9n",
        "$(touch MARKER)",
        "a b'c\"d",
        "-x",
        "\x1b[31m",
        "a\nb",
        "r" * 200,
    )
    for run in names:
        for command in ("report", "package", "bench", "build"):
            arrange = functools.partial(_on_run, ground, command, run)
            locale = {} if isinstance(run, bytes) or random.random() < 0.5 else _NO_UTF8
            yield Case(f"run called {run!r}, {locale}: {command}", arrange, environment=locale, shell=_HERE)
    yield from _limits(ground)
    yield from _neighbours(ground)
    yield from _disks(ground)
    yield from _ends(ground)


def _on_run(ground: Ground, command: str, name: str | bytes, here: Path) -> Arguments:
    if command == "plan":
        return ["plan", *ground.job]
    if command == "models":
        return ["models", "pvt"]
    if command == "missing":
        return ["report", "/nonexistent"]
    run = Path(os.fsdecode(os.fsencode(here / "runs") + b"/" + os.fsencode(name)))
    run.parent.mkdir()
    shutil.copytree(ground.run, run)
    return of_run(ground, command, run)


def _build(ground: Ground, here: Path) -> Arguments:
    return ["build", *ground.job, "-o", here / "run", "--quiet"]


def _package(ground: Ground, here: Path) -> Arguments:
    return ["package", ground.run, "-o", here / "package", "--quiet"]


def no_drafts(here: Path, outcome: Outcome) -> list[str]:
    """Nothing in the making is left of a command that ended by itself."""
    left = drafts_in(here)
    return [f"left behind: {left[:3]}"] if left else []


def _limits(ground: Ground) -> Iterator[Case]:
    limits = [("ulimit -n", resource.RLIMIT_NOFILE, number, str(number)) for number in (8, 16, 32, 64)]
    limits += [
        ("ulimit -f", resource.RLIMIT_FSIZE, number, f"{number:,} bytes") for number in (0, 1000, 30_000, 200_000)
    ]
    limits += [
        ("ulimit -v", resource.RLIMIT_AS, number * _MB, f"{number:,} MB") for number in (300, 1000, 2000, 4000, 8000)
    ]
    limits += [("ulimit -s", resource.RLIMIT_STACK, number * 1024, f"{number} kB") for number in (256, 1024)]
    limits += [("ulimit -u", resource.RLIMIT_NPROC, number, str(number)) for number in (1, 20)]
    for name, kind, number, shown in limits:
        # of training, an unfinished work folder stays: it goes on from there
        yield Case(f"{name} {shown}: build", functools.partial(_build, ground), limits=((kind, number),), shell=_HERE)
        arrange = functools.partial(_package, ground)
        yield Case(f"{name} {shown}: package", arrange, limits=((kind, number),), shell=_HERE, check=no_drafts)


def _neighbours(ground: Ground) -> Iterator[Case]:
    """Files of the user that are called like modules."""
    boom = f"open({str(ground.marker)!r}, 'w'); raise SystemExit('a file of the user')\n"
    names = ("upvits.py", "upvits/__init__.py", "deploy/__init__.py", "toolchain.py", "calib_data.py", "torch.py",
             "timm.py",             "onnx/model.onnx", "json.py", "typing.py", "sitecustomize.py")  # fmt: skip
    for name in names:

        def arrange(here: Path, name: str = name) -> Arguments:
            (here / name).parent.mkdir(exist_ok=True)
            (here / name).write_text(boom)
            return ["plan", *ground.job]

        yield Case(f"beside {name}", arrange, "done", shell=_HERE)


def _disks(ground: Ground) -> Iterator[Case]:
    """Small disks for the results, the package and the temporary files; needs root, for mount."""
    if os.geteuid() != 0:
        return
    disk = ground.work / "disk"
    for kilobytes in (64, 200, 500, 1000, 2000):
        for what in ("build", "package", "TMPDIR of build", "TMPDIR of bench"):
            arrange = functools.partial(_on_disk, ground, disk, what, kilobytes)
            variables = {"TMPDIR": str(disk)} if what.startswith("TMPDIR") else {}
            check = functools.partial(_unmounted, disk)
            yield Case(f"{what} on {kilobytes} kB", arrange, environment=variables, check=check, shell=_HERE)
    for command in ("build", "report", "package", "bench"):
        arrange = functools.partial(_read_only, ground, disk, command)
        yield Case(f"run that is read-only: {command}", arrange, check=functools.partial(_unmounted, disk), shell=_HERE)


def _mounted(disk: Path, options: str) -> bool:
    disk.mkdir(exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode == 0


def _on_disk(ground: Ground, disk: Path, what: str, kilobytes: int, here: Path) -> Arguments:
    if not _mounted(disk, f"size={kilobytes}k"):
        return ["--version"]  # no right to mount here: root in a container
    if what == "TMPDIR of bench":
        return of_run(ground, "bench", ground.run)
    if what == "TMPDIR of build":
        return _build(ground, here)
    return _build(ground, disk) if what == "build" else _package(ground, disk)


def _read_only(ground: Ground, disk: Path, command: str, here: Path) -> Arguments:
    if not _mounted(disk, "size=20m"):
        return ["--version"]
    run = ground.copy_of_run(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return of_run(ground, command, run)


def _unmounted(disk: Path, here: Path, outcome: Outcome) -> list[str]:
    left = [name for name in drafts_in(disk) if "3-distill.work" not in name] if disk.exists() else []
    left += [path.name for path in disk.glob("upvits*")]
    subprocess.run(["umount", "-l", disk], capture_output=True)
    with suppress(OSError):
        disk.rmdir()
    return [f"left behind: {left[:3]}"] if left else []


def _ends(ground: Ground) -> Iterator[Case]:
    """Ctrl-C, SIGTERM, and several commands at once."""
    for name in ("INT", "TERM", "HUP"):
        for seconds in (2, 3, 4, 6, 8):  # before, Python itself is still starting
            line = f"timeout --preserve-status -k 120 -s {name} {seconds} {_HERE}"
            codes = (130, 143, 129)
            yield Case(
                f"SIG{name} after {seconds} s",
                functools.partial(_build, ground),
                shell=line,
                codes=codes,
                check=_stopped,
            )
    # both may end well, or one says that the other is at work
    twice = f"{_HERE} & {_HERE}; b=$?; wait $!; a=$?; [ $((a + b)) = 0 ] || [ $((a * b)) = 0 -a $((a + b)) = 2 ]"
    same = functools.partial(_same_run, ground)
    yield Case("two builds at once", functools.partial(_build, ground), "done", shell=twice, check=same)
    yield Case("two packages at once", functools.partial(_package, ground), "done", shell=twice, check=no_drafts)
    back = functools.partial(_build, ground)
    yield Case("the clock goes back", back, "done", check=same, hook=_clock_back)
    yield Case("a run is moved", functools.partial(_moved, ground), "done", check=_not_again, shell=_HERE)


def _clock_back() -> None:
    """Let the clock be eleven years behind from the fourth look on."""
    looks, now = itertools.count(), time.time
    time.time = lambda: now() - (11 * 365 * 86_400 if next(looks) > 3 else 0)


def _moved(ground: Ground, here: Path) -> Arguments:
    shutil.copytree(ground.run, here / "m \u00fc")
    return ["build", *ground.job, "-o", here / "m \u00fc", "--quiet"]


def _not_again(here: Path, outcome: Outcome) -> list[str]:
    stages = json.loads((here / "m \u00fc/report.json").read_text())["stages"]
    return [f"{stage['name']} ran again" for stage in stages if not stage["skipped"]]


def _stopped(here: Path, outcome: Outcome) -> list[str]:
    left = [name for name in drafts_in(here) if "3-distill.work" not in name]
    return [f"left behind: {left[:3]}"] if left and outcome.code != 129 else []


def _same_run(ground: Ground, here: Path, outcome: Outcome) -> list[str]:
    return [name for name in SAME if file_digest(here / "run" / name) != file_digest(ground.run / name)]
