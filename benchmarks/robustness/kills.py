"""SIGKILL at a change of the file system or at a moment; the same command then ends as if nothing had been."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.robustness.case import Case, Ground, Outcome
from benchmarks.robustness.driver import drafts_in, judged, outcome_of
from upvits.deploy.store.artifacts import file_digest

_CHANGES = ("rename", "replace", "unlink", "mkdir", "rmdir", "fsync", "chmod", "link", "symlink")
_MEASURED = re.compile(
    r"second|rss|created|_ms$|^ms$|latency|speedup|^low$|^high$|load|stages|best|findings|threads|reproduce|layer_times|median"
    r"|on_front|verdict"
)
"""Entries of a report that are other ones every time: what was timed, and what follows from it."""


def kill_at_change(number: int) -> None:
    """Let this process be killed just before it changes the file system for the n-th time."""
    count = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return call

    for name in _CHANGES:
        setattr(os, name, counted(getattr(os, name)))


def kill_after(seconds: float) -> None:
    """Let this process be killed after some time."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def kills(ground: Ground, random: Random, number: int) -> Iterator[tuple[str, int, list[str], Outcome]]:
    """Kill jobs until `number` kills have hit `build`, and a third of that the other commands.

    Yields:
        Name, kills, what is wrong, and the outcome of the command that came last.
    """
    reference = _results(ground.run)
    hit = 0
    while hit < number:
        killed, name, outcome = _chain(ground, random, _build(ground), number - hit)
        hit += killed
        wrong = [f"{place} differs" for place in _differing(reference, _results(_place(ground) / "run"))]
        yield f"build, {name}", killed, _judged(ground, outcome, wrong), outcome
    for command, count in (("package", number // 6), ("report", number // 12), ("sweep", number // 12)):
        if count:
            yield from _others(ground, random, command, count)


def _others(ground: Ground, random: Random, command: str, number: int) -> Iterator[tuple[str, int, list[str], Outcome]]:
    arrange = {"package": _package, "report": _report, "sweep": _sweep}[command](ground)
    _fresh(ground)
    outcome = outcome_of(Case(command, lambda here: arrange(_place(ground))), ground)
    reference = _results(_place(ground))
    yield f"{command}, not killed", 0, _judged(ground, outcome, []), outcome
    hit = 0
    while hit < number:
        killed, name, outcome = _chain(ground, random, arrange, number - hit, keep=command != "sweep")
        hit += max(killed, 1)
        wrong = [f"{place} differs" for place in _differing(reference, _results(_place(ground)))]
        yield f"{command}, {name}", killed, _judged(ground, outcome, wrong), outcome


def _chain(
    ground: Ground, random: Random, arrange: Callable[[Path], list[Any]], most: int, *, keep: bool = False
) -> tuple[int, str, Outcome]:
    """Start a job again and again, killing it each time, until it gets through; `keep` starts where the last ended."""
    if not keep:
        _fresh(ground)
    by_change, killed = random.random() < 0.6, 0
    while True:
        hook = None
        if killed < min(most, 8):
            moment = random.randint(1, 60) if by_change else random.uniform(0.1, 4.0)
            hook = functools.partial(kill_at_change if by_change else kill_after, moment)  # type: ignore[arg-type]
        outcome = outcome_of(Case("killed", lambda here: arrange(_place(ground)), hook=hook), ground)
        if outcome.code != -signal.SIGKILL or outcome.stopped:
            return killed, f"{killed} kills {'at changes' if by_change else 'in time'}", outcome
        killed += 1


def _place(ground: Ground) -> Path:
    return ground.work / "given" / "killed"


def _fresh(ground: Ground) -> None:
    shutil.rmtree(_place(ground), ignore_errors=True)
    _place(ground).mkdir()


def _build(ground: Ground) -> Callable[[Path], list[Any]]:
    return lambda place: ["build", *ground.job, "-o", place / "run", "--quiet"]


def _package(ground: Ground) -> Callable[[Path], list[Any]]:
    return lambda place: ["package", ground.run, "-o", place / "package", "--quiet"]


def _report(ground: Ground) -> Callable[[Path], list[Any]]:
    def arrange(place: Path) -> list[Any]:
        if not (place / "run").exists():
            ground.copy_of_run(place)
        return ["report", place / "run"]

    return arrange


def _sweep(ground: Ground) -> Callable[[Path], list[Any]]:
    shared = [part for part in ground.job if part not in ("--ratio", "0.5")]
    return lambda place: ["sweep", *shared, "--ratios", "0.3,0.5", "-o", place / "sweep", "--quiet"]


def _judged(ground: Ground, outcome: Outcome, wrong: list[str]) -> list[str]:
    found = judged(Case("", lambda here: [], "done"), outcome, ground)
    left = drafts_in(_place(ground))
    return found + (wrong if outcome.code == 0 else []) + ([f"left behind: {left[:3]}"] if left else [])


def _results(folder: Path) -> dict[str, Any]:
    """What a folder holds, without what was timed: documents as values, other files as digests."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name == ".lock":
            continue
        if path.name in ("report.json", "sweep.json"):
            found[name] = _lasting(json.loads(path.read_text()))
        elif re.search(r"scores|model|plan\.json|predictions|reference|export\.json|labels|requirements", name):
            found[name] = "" if path.suffix in (".html", ".md") else file_digest(path)
        else:
            found[name] = ""
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(item) for name, item in value.items() if not _MEASURED.search(name)}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of what is not the same, those of entries of documents included."""
    found = []
    for name in sorted({*first, *second}):
        one, other = first.get(name), second.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{name}: {entry}" for entry in _differing(one, other)]
        elif one != other:
            found.append(name)
    return found
