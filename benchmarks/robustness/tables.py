"""Tables of files and labels, class maps, and folders of torchvision from strangers."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from benchmarks.robustness.case import CUT, NAMES, SIDE, Arguments, Case, Ground
from benchmarks.robustness.mutations import DAMAGES, NUMBERS, OTHERS, TEXTS, shown

_ROWS = 8
_SEPARATORS = {"a.csv": "a,b\n", "a.tsv": "\t\n", "a.jsonl": "{}\n", "a.txt": "a b\n", "a.json": "[],"}
_MAPS = (
    "", "disk", "disk\nsquare\nsquare", '["disk", "square", null]', '{"disk": 0, "square": 100000}', "{}", "[[]]",
    '{"disk": 0, "square": -1}', '{"disk": 0, "square": ' + "9" * 5_000 + "}", '{"0": "disk", "\u00b2": "square"}',
    '{"disk": 0, "square": true}', "[" * 100_000, "[" + '"a",' * 600_000 + '"b"]', "\n" * 1_000_000,
)  # fmt: skip
_SETS = ("mnist", "kmnist", "fashion_mnist", "qmnist", "cifar10")


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """One row with another label or path; nothing but separators; class maps; pickles of torchvision."""
    values = [*TEXTS, *NUMBERS, *OTHERS]
    for value in random.sample(values, 30):
        for entry in ("file", "label"):
            text = "".join(json.dumps({**_row(index), **({entry: value} if index == 3 else {})}) + "\n"
                           for index in range(_ROWS))  # fmt: skip
            yield Case(f"jsonl: {entry} = {shown(value)}", functools.partial(_table, ground, "a.jsonl", text))
    for text in random.sample(TEXTS, 20):
        rows = "".join(f"disk/{index}.png,{text}\nsquare/{index}.png,b\n" for index in range(_ROWS))
        yield Case(f"csv: label {shown(text)}", functools.partial(_table, ground, "a.csv", f"file,label\n{rows}"))
        yield Case(f"csv: column {shown(text)}", functools.partial(_table, ground, "a.csv", f"file,{text}\n{rows}"))
    for name, row in _SEPARATORS.items():
        text = row * (80_000_000 // len(row))
        text = f"[{text}0]" if name.endswith(".json") else text
        yield Case(f"separators alone in {name}", functools.partial(_table, ground, name, text), "refused")
    for text in (*_MAPS, *(f"disk\nsquare\n{text}" for text in random.sample(TEXTS, 10))):
        yield Case(f"class map {shown(text)}", functools.partial(_map, ground, functools.partial(_write, text)))
    for damage in DAMAGES:
        yield Case(f"class map {damage}", functools.partial(_map, ground, DAMAGES[damage]))
    for name in _SETS:
        yield Case(f"pickles as {name}", functools.partial(_torch, ground, name), "refused")


def _row(index: int) -> dict[str, object]:
    return {"file": f"{NAMES[index % 2]}/{index}.png", "label": NAMES[index % 2]}


def _planned(*data: str | Path) -> Arguments:
    return ["plan", *CUT, "--weights", "random", "--image-size", str(SIDE), "--method", "magnitude", "--data", *data]


def _write(text: str, path: Path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _table(ground: Ground, name: str, text: str, here: Path) -> Arguments:
    shutil.copytree(ground.photos / "train", here / "set")
    _write(text, here / "set" / name)
    return _planned(f"csv:{here / 'set' / name}")


def _map(ground: Ground, change: Callable[[Path], None], here: Path) -> Arguments:
    (here / "map.txt").write_text("\n".join(NAMES))
    change(here / "map.txt")
    return _planned(f"imagefolder:{ground.photos}", "--class-map", here / "map.txt")


class _Harmful:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.marker), "w"))


def _torch(ground: Ground, name: str, here: Path) -> Arguments:
    harmful = pickle.dumps(_Harmful(ground.marker))
    kind = {"mnist": "MNIST", "kmnist": "KMNIST", "fashion_mnist": "FashionMNIST", "qmnist": "QMNIST"}.get(name, "x")
    batches = [f"cifar-10-batches-py/{part}" for part in ("batches.meta", "test_batch", "data_batch_1")]
    for place in (f"{kind}/processed/training.pt", f"{kind}/processed/test.pt", *batches):
        (here / place).parent.mkdir(parents=True, exist_ok=True)
        (here / place).write_bytes(harmful)
    return _planned(f"torch:{name}:{here}")
