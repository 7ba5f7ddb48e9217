"""What a case is, what came of it, and the ground on which cases stand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from PIL import Image

Arguments: TypeAlias = Sequence[str | bytes | Path]
Expected: TypeAlias = Literal["any", "refused", "done"]

NAMES = ("disk", "square")
SIDE = 32
"""Pixels of the pictures, and of what the small network takes."""

CUT = ("--model", "deit_tiny", "--ratio", "0.5")
CHEAP = (
    "--method", "magnitude", "--no-compensate", "--epochs", "1", "--proxy-images", "16", "--runtime", "onnxruntime",
    "--precision", "fp32", "--bench-seconds", "0.1",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code, or minus the number of the signal that ended it.
        output, errors: standard output and standard error.
        cpu: seconds of CPU, those of processes that it started included.
        stopped: why it was stopped; empty where it ended by itself.
        report: what the tool wrote about an error of its own.
    """

    code: int
    output: str
    errors: str
    cpu: float
    stopped: str = ""
    report: str = ""


def nothing_more(here: Path, outcome: Outcome) -> list[str]:
    """The check of a case that has none of its own."""
    return []


@dataclass(frozen=True, slots=True)
class Case:
    """One command that may do harm, and what is right.

    Attributes:
        name: what is wrong with the input.
        arrange: fills an empty folder, and returns the command's arguments. The command works in that folder.
        expect: `refused` and `done` say how it has to end; `any` leaves it to the command, which then has to be right.
        check: what else is wrong, in words; it sees the folder and the outcome.
        environment: variables to set, or to remove (None).
        shell: a line for bash in which `"$@"` is the command: a process of its own. Empty: a fork of this one.
        limits: of `resource.setrlimit`, soft and hard alike.
        hook: runs in the fork before the command does.
        codes: exit codes that are right, beside those of `documented`.
    """

    name: str
    arrange: Callable[[Path], Arguments]
    expect: Expected = "any"
    check: Callable[[Path, Outcome], list[str]] = nothing_more
    environment: Mapping[str, str | None] = field(default_factory=dict)
    shell: str = ""
    limits: tuple[tuple[int, int], ...] = ()
    hook: Callable[[], None] | None = None
    codes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ground:
    """Folders of a campaign; everything is below `work`.

    Attributes:
        case: the folder of the case that runs, made anew for each.
        precious: files that no command may touch.
        marker: a file that payloads make when they run.
        photos: a data set of two classes.
        dense: a small trained network as a model folder.
        run: a finished run of it.
    """

    work: Path

    @property
    def case(self) -> Path:
        return self.work / "case"

    @property
    def precious(self) -> Path:
        return self.work / "precious"

    @property
    def marker(self) -> Path:
        return self.work / "MARKER"

    @property
    def temporary(self) -> Path:
        return self.work / "tmp"

    @property
    def home(self) -> Path:
        return self.work / "home"

    @property
    def photos(self) -> Path:
        return self.work / "given" / "photos"

    @property
    def dense(self) -> Path:
        return self.work / "given" / "dense"

    @property
    def run(self) -> Path:
        return self.work / "given" / "run"

    @property
    def job(self) -> tuple[str, ...]:
        """The settings of `run`."""
        return (*CUT, "--weights", str(self.dense), "--data", f"imagefolder:{self.photos}", *CHEAP)

    def copy_of_run(self, here: Path) -> Path:
        """A copy of the finished run, to be damaged."""
        return Path(shutil.copytree(self.run, here / "run"))


def prepare(ground: Ground) -> None:
    """Make what cases start from, but for the finished run."""
    for folder in (ground.precious, ground.temporary, ground.home, ground.work / "given"):
        folder.mkdir(parents=True, exist_ok=True)
    (ground.precious / "notes.txt").write_text("mine")
    if not ground.photos.exists():
        draw_photos(ground.photos, 16, 8)
    if not ground.dense.exists():
        save_network(ground.dense)


def draw_photos(folder: Path, train: int, val: int) -> None:
    """A labelled image folder of two classes, `train` and `val` pictures of each."""
    from upvits.calib_data.drawing import draw_labelled

    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels, _ = draw_labelled(number, split, index, SIDE)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")


def save_network(folder: Path) -> None:
    """A ViT of two blocks for two classes, as a model folder."""
    import timm
    import torch

    from upvits import toolchain

    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "depth": 2, "embed_dim": 48, "num_heads": 3}
    network = timm.create_model("deit_tiny_patch16_224", num_classes=len(NAMES), **sizes)
    toolchain.save(network, folder, model_args=sizes)
