"""Options of every command, read from the command line itself, with values that mean something else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, get_args

import typer

from benchmarks.robustness.case import CHEAP, Arguments, Case, Expected, Ground
from benchmarks.robustness.detection import scenes
from benchmarks.robustness.mutations import TEXTS, shown
from upvits.deploy.cli.app import app

_NO_WHOLE_NUMBERS = (
    "abc",
    "",
    " ",
    "1.5",
    "nan",
    "1e3",
    "0x10",
    "\u00b2",
    "[/]",
    "1" * 5000,
    "--",
    "\x1b[31m",
)
_NO_NUMBERS = ("abc", "", "nan", "inf", "-inf", "1e309", "1,5", "[/]", "\u00b2", "\x1b]0;x\x07")
_STRANGE_NUMBERS = ("-1", "0", "1", "10" * 15, str(2**63))
_OPEN_ENDED = ("--seconds", "--bench-seconds")  # measured for so long: "1" is harmless, a day is what was asked for
_SMALL_DETECTOR = (
    "--epochs", "1", "--scale", "64x64", "--fpn-channels", "16", "--stacked-convs", "1", "--workers", "0",
)  # fmt: skip
_EACH = 14
"""Values per option."""


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """Each option of each command with values drawn for its type; then what no type says."""
    commands = dict(_commands(app))
    users: dict[str, list[str]] = {}
    kinds: dict[str, type] = {}
    for command, callback in commands.items():
        for option, kind in _options(callback):
            users.setdefault(option, []).append(command)
            kinds[option] = kind
    for option, kind in kinds.items():
        for value, refused in _values(option, kind, random):
            command = random.choice(users[option])
            arrange = functools.partial(_arrange, ground, command, option, value)
            yield Case(f"{command} {option} {shown(value)}", arrange, "refused" if refused else "any")
    yield from _contradictions(ground)
    yield from _arguments(ground, list(commands), random)


def _commands(group: typer.Typer, before: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for info in group.registered_commands:
        if info.callback is not None:
            yield before + (info.name or info.callback.__name__), info.callback
    for part in group.registered_groups:
        if part.typer_instance is not None:
            yield from _commands(part.typer_instance, f"{part.name} ")


def _options(callback: Callable[..., Any]) -> Iterator[tuple[str, type]]:
    """The options of a command that take a value, and the type of it."""
    for parameter in inspect.signature(callback, eval_str=True).parameters.values():
        kind, *more = get_args(parameter.annotation)
        named = [info for info in more if isinstance(info, typer.models.OptionInfo)]
        kinds = {int, float} & {kind, *get_args(kind)}
        if named and bool not in (kind, *get_args(kind)):
            names = [name for name in named[0].param_decls or () if name.startswith("--")]
            yield next(iter(names), f"--{parameter.name.replace('_', '-')}"), next(iter(kinds), str)


def _values(option: str, kind: type, random: Random) -> Iterator[tuple[str | bytes, bool]]:
    """Values and whether they have to be refused, whatever the command."""
    if kind is int:
        yield from ((value, True) for value in _NO_WHOLE_NUMBERS)
        yield from ((value, False) for value in _STRANGE_NUMBERS)
    elif kind is float:
        yield from ((value, True) for value in _NO_NUMBERS)
        if option not in _OPEN_ENDED:
            yield from ((value, False) for value in (*_STRANGE_NUMBERS, "1e-320", "1e300", "1.0000001"))
    else:
        texts = [text for text in TEXTS if "\0" not in text]  # no argument of a process has one
        if option == "--output":  # these name places where somebody may well want the output
            texts = [text for text in texts if not text.startswith(("../../", "/escaped"))]
        yield from ((value, False) for value in random.sample(texts, _EACH))
        yield b"\xff\xfe", False
        yield "imagefolder:", False


def _arrange(ground: Ground, command: str, option: str, value: str | bytes, here: Path) -> Arguments:
    """A command that works, but for one option: as `--option=value`, so that any value is one."""
    given = _working(ground, command, here)
    if option in given:
        position = given.index(option)
        del given[position : position + 2]
    encoded = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    return [*given, option.encode() + b"=" + encoded]


def _working(ground: Ground, command: str, here: Path) -> list[Any]:
    run = ground.run
    if command in ("models", "doctor"):
        return [command]
    if command in ("report", "package"):
        return [command, ground.copy_of_run(here)]
    if command == "bench":
        return ["bench", run / "4-export/pruned/model.onnx", "--runtime", "onnxruntime", "--seconds", "0.05"]
    if command == "sweep":
        shared = [part for part in ground.job if part not in ("--ratio", "0.5")]
        return ["sweep", *shared, "--ratios", "0.5", "--output", str(here / "sweep")]
    if command == "detect export":
        return ["detect", "export", run, "--output", str(here / "detector.onnx")]
    if command == "detect prune":
        return ["detect", "prune", run, "--output", str(here / "detector")]
    if command == "detect eval":
        return ["detect", "eval", run]
    if command.startswith("detect"):
        return [*command.split(), "--run", ground.copy_of_run(here), *_SMALL_DETECTOR, "--coco", scenes(ground)]
    place = [] if command in ("plan", "recipe") else ["--output", str(here / "run")]
    return [command, *ground.job, *place]


def _contradictions(ground: Ground) -> Iterator[Case]:
    cuts = {
        "--ratio": "0.5", "--target-macs": "0.5", "--target-params": "0.5", "--like": "pvt_v2_b0",
        "--target-latency": "2ms", "--speedup": "2x",
    }  # fmt: skip
    names = list(cuts)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            both = ["build", "--model", "pvtv2_b0", first, cuts[first], second, cuts[second]]
            yield Case(f"both {first} and {second}", lambda here, both=both: both, "refused")  # type: ignore[misc]
    plans = (
        "--planner latency", "--planner global --depth-ratio 0.2", "--components embed,embed",
        "--components attention,heads", "--planner uniform --components depth", "--targets sm86",
        "--precision fp8 --runtime openvino", "--precision fp32,fp32", "--precision auto,fp32", "--batch 8:1:32",
        "--batch 0:0:0", "--batch 32:8:1", "--batch 1:8:999999999999", "--runtime onnxruntime,onnxruntime",
        "--runtime auto,onnxruntime", "--device cuda:99", "--device meta", "--device mps", "--align 999999",
        "--image-size 17", "--image-size 4096", "--opset 17", "--data hfds:nope/nope",
        "--data torch:cifar10:/nonexistent",
        "--data torch:nope", "--weights /dev/null", "--weights /", "--weights .", "--recipe /dev/null", "--recipe /",
        "--finetuned /dev/null", "--finetuned .",
        "--data imagefolder:/proc/self", "--data imagefolder:/etc", "--data imagefolder:/dev",
        "--calib imagefolder:/etc",
        "--streams 99999", "--streams 1,1", "--bench-batches 8,8", "--bench-batches 0", "--data wds:/etc",
        "--workspace 999999999999", "--epochs 999999999999", "--refit-images 999999999999",
        "--proxy-images 99999999999",
    )  # fmt: skip
    for options in plans:
        given = ["plan", *ground.job, *options.split()]
        yield Case(f"plan {options}", lambda here, given=given: given)  # type: ignore[misc]
    sweeps = ("", "--ratios ,", "--ratios 0.5,0.5", "--ratios 2", "--macs 0", "--macs -1", "--speedups x",
              "--speedups 0x", "--speedups nanx", "--latencies 0ms", "--latencies 1e309ms", "--latencies 1/../../x",
              "--ratios 0.50,0.5000001", "--ratios 0.5 --macs 0.5")  # fmt: skip
    for options in sweeps:
        given = ["sweep", "--model", "deit_tiny", *CHEAP, *options.split()]
        yield Case(f"sweep {options}", lambda here, given=given: given, "refused")  # type: ignore[misc]
    for place in (ground.precious, ground.precious / "notes.txt", ground.precious / "notes.txt/x", "/proc/x",
                  "/dev/null", "/dev/full", "/", "/proc/self/mem", "a" * 300, b"bad\xff"):  # fmt: skip
        for command in ("build", "package", "bench", "sweep"):
            arrange = functools.partial(_into, ground, command, place)
            expect: Expected = "any" if isinstance(place, bytes) else "refused"  # some commands write such names
            yield Case(f"{command} -o {shown(place)[-40:]}", arrange, expect)


def _into(ground: Ground, command: str, place: str | bytes | Path, here: Path) -> Arguments:
    given = _working(ground, command, here)
    if "--output" in given:
        del given[-2:]
    return [*given, "-o", place]


def _arguments(ground: Ground, commands: list[str], random: Random) -> Iterator[Case]:
    """What stands where no option does, and words that are none."""
    texts = [text for text in TEXTS if "\0" not in text]
    targets: tuple[str | bytes | Path, ...] = (
        "/dev/null", "/dev/zero", "/", "/etc/passwd", "/proc/self/mem", b"bad\xff", ground.dense, ground.photos,
        "nope.onnx", *texts,
    )  # fmt: skip
    for command in ("bench", "report", "package", "detect eval", "detect export"):
        for target in random.sample(targets, 18):
            given = [*command.split(), *(["-o", "x.onnx"] if command == "detect export" else []), "--", target]
            yield Case(f"{command} {shown(target)[-40:]}", lambda here, given=given: given)  # type: ignore[misc]
    for command in ["", *commands, "nope", "[/]", "\x1b[31m"]:
        for extra in ("--help", "--nope", "--[/]", "\x1b[31m", "-", "--quiet=x"):
            words = [*command.split(), extra]
            yield Case(" ".join(map(shown, words)), lambda here, words=words: words)  # type: ignore[misc]
