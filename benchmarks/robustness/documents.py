"""Documents that are well-formed and wrong: of a run, of a report, of a recipe."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

from benchmarks.robustness.case import Arguments, Case, Ground, Outcome
from benchmarks.robustness.mutations import (
    MARKUP,
    mutated,
    no_documents,
    places,
    replaced,
    shown,
    written,
)
from upvits.deploy.store.artifacts import MANIFEST, file_digest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_EACH, _OF_REPORT, _OF_RECIPE = 14, 110, 110
_READERS = {"4-export": ("bench", "package"), "5-engine": ("bench", "package"), "3-distill": ("package", "build")}
SAME = ("3-distill/model/model.safetensors", "4-export/pruned/model.onnx", "2-prune/plan.json")
"""Files that are the same in every run of the same job."""


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """Changes of every JSON document of a run, one at a time, half of them with a manifest that agrees."""
    for path in sorted(ground.run.rglob("*.json")):
        name = path.relative_to(ground.run).as_posix()
        content = path.read_bytes()
        if name == "report.json":
            continue
        document = json.loads(content)
        changes = [mutated(document, random) for _ in range(_EACH)]
        bad = random.sample(sorted(no_documents(content).items()), 4)
        for what, new in [(what, written(value)) for what, value in changes] + bad:
            command = random.choice(_READERS.get(name.split("/")[0], ("package", "build")))
            sealed = not name.endswith(MANIFEST) and random.random() < 0.5
            arrange = functools.partial(_with_document, ground, command, name, new, sealed)
            check = functools.partial(_as_before, ground)
            yield Case(f"{command}, {name}: {what}{', sealed' if sealed else ''}", arrange, check=check)


def _with_document(ground: Ground, command: str, name: str, new: bytes, sealed: bool, here: Path) -> Arguments:
    run = ground.copy_of_run(here)
    (run / name).write_bytes(new)
    if sealed:
        reseal(run, name)
    return of_run(ground, command, run)


def of_run(ground: Ground, command: str, run: Path) -> Arguments:
    """A command on a run; `build` continues it."""
    if command == "build":
        return ["build", *ground.job, "-o", run, "--quiet"]
    if command == "bench":
        return ["bench", run, "--seconds", "0.05", "--quiet"]
    if command == "package":
        return ["package", run, "-o", run.with_name("package"), "--quiet"]
    return [command, run]


def reseal(run: Path, name: str) -> None:
    """Let the manifest of the stage say what is in a file now, as whoever changed it can."""
    folder = next(parent for parent in (run / name).parents if (parent / MANIFEST).is_file())
    manifest = json.loads((folder / MANIFEST).read_text())
    key = (run / name).relative_to(folder).as_posix()
    manifest["files"][key] = {"sha256": file_digest(run / name), "bytes": (run / name).stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _as_before(ground: Ground, here: Path, outcome: Outcome) -> list[str]:
    """Weights and graphs are the undamaged run's where a command says that all is well."""
    if outcome.code != 0:
        return []
    return [
        f"{name} differs from the undamaged run"
        for name in SAME
        if not name.endswith(".json") and (here / "run" / name).is_file()
        if file_digest(here / "run" / name) != file_digest(ground.run / name)
    ]


def reports(ground: Ground, random: Random) -> Iterator[Case]:
    """report.json: markup in each kind of text, a hostile number in each kind of figure, and any change at all."""
    content = (ground.run / "report.json").read_bytes()
    document = json.loads(content)
    seen: set[str] = set()
    for at, old in places(document):
        kind = re.sub(r"\d+", "#", ".".join(map(str, at[-2:])))
        if isinstance(old, str) and kind not in seen:
            seen.add(kind)
            yield _report(ground, f"{kind} is markup", replaced(document, at, f"{MARKUP}\x1b]0;x\x07[red]|"))
    for name in _names(document):
        renamed = json.loads(json.dumps(document).replace(f'"{name}":', json.dumps(f"{MARKUP}\x1b[31m") + ":"))
        yield _report(ground, f"a figure is called {name}, in markup", renamed)
    for _ in range(_OF_REPORT):
        what, changed = mutated(document, random)
        yield _report(ground, what, changed)
    for what, raw in no_documents(content).items():
        yield _report(ground, what, raw)
    yield from _comparisons(ground)


def _names(document: Any) -> list[str]:
    """Names in maps whose keys are data."""
    return sorted(
        {str(at[-1]) for at, _ in places(document) if at[-1] in ("onnxruntime", "fp32", "b1", "numpy", "blocks.0.mlp")}
    )


def _report(ground: Ground, what: str, document: Any) -> Case:
    def arrange(here: Path) -> Arguments:
        (here / "run").mkdir()
        (here / "run/report.json").write_bytes(document if isinstance(document, bytes) else written(document))
        (here / "run/recipe.toml").write_bytes((ground.run / "recipe.toml").read_bytes())
        return ["report", here / "run"]

    return Case(f"report.json: {what}", arrange, check=without_markup)


def without_markup(here: Path, outcome: Outcome) -> list[str]:
    """No page and no text below a folder holds the markup that a document or a name brought along."""
    return [
        f"raw HTML in {path.name}"
        for path in [*here.rglob("*.html"), *here.rglob("*.md")]
        if re.search(r"(?<!\\)(<script>alert\(1\)|<img src=x)", path.read_text(errors="replace"))
    ]


def _comparisons(ground: Ground) -> Iterator[Case]:
    def two(*options: str | Path) -> Callable[[Path], Arguments]:
        def arrange(here: Path) -> Arguments:
            (here / "c.json").write_text("mine")
            (here / "folder").mkdir()
            return ["report", ground.run, ground.copy_of_run(here), *options]

        return arrange

    def kept(here: Path, outcome: Outcome) -> list[str]:
        return [] if (here / "c.json").read_text() == "mine" else ["a file of the user was overwritten"]

    for place in ("c.html", "c.json", "folder", "/dev/null", "", "no-ending", "../precious/notes.txt", "a" * 300, "/"):
        yield Case(f"comparison, -o {shown(place)}", two("-o", place), check=kept)


def recipes(ground: Ground, random: Random) -> Iterator[Case]:
    """Recipes with one change, as TOML, and what is none."""
    content = (ground.run / "recipe.toml").read_text()
    document = tomllib.loads(content)
    made = 0
    while made < _OF_RECIPE:
        what, changed = mutated(document, random)
        try:
            text = tomli_w.dumps(changed).encode()
        except (TypeError, ValueError, AttributeError):  # no TOML says this
            continue
        made += 1
        yield _recipe(random.choice(("plan", "recipe", "plan", "score", "sweep")), what, text)
    for what, raw in {**no_documents(content.encode()), **_STRANGE_TOML}.items():
        yield _recipe("plan", what, raw)
    for what, raw in {**no_documents(b'base = "modern"\nepochs = 2\n'), **_STRANGE_TRAINING}.items():
        yield _recipe_of_training(what, raw)


_STRANGE_TRAINING = {
    **{f"base = {value}": f"base = {value}\n".encode() for value in (3, '["up"]', '"t.toml"', '""', "{a = 1}")},
    **{
        f"auto_augment = {policy}": f'auto_augment = "{policy}"\n'.encode()
        for policy in ("rand-m9.5", "rand-n1.5", "rand-n1000", "augmix-w100-d100", "augmix-a0", "rand-m\u0663", "-", "")
    },
    "a date": b"epochs = 1979-05-27\n", "a table": b"[epochs]\na = 1\n", "a recipe in it": b'train_recipe = "up"\n',
    "passes that share no batch": b"batch_size = 10\naccumulation = 4\n", "no rate": b"lr = nan\n",
    "nothing to learn from": b"label_weight = 0\nlogit_weight = 0\nfeature_weight = 0\n",
    "smoothing of no labels": b'base = "modern"\nlabel_weight = 0\n', "5,000 digits": b"epochs = " + b"9" * 5000,
}  # fmt: skip


def _recipe_of_training(what: str, text: bytes) -> Case:
    def arrange(here: Path) -> Arguments:
        (here / "t.toml").write_bytes(text)
        return ["recipe", "--model", "pvtv2_b0", "--ratio", "0.5", "--train-recipe", here / "t.toml"]

    return Case(f"recipe of training: {what}", arrange)


_STRANGE_TOML = {
    "a date as model": b"model = 1979-05-27T07:32:00Z\n", "a table as model": b"[model]\nx = 1\n",
    "lists in lists": b'model = "deit_tiny"\nx = ' + b"[" * 20_000 + b"]" * 20_000,
    "tables in tables": b'model = "deit_tiny"\nx = ' + b"{a = " * 3000 + b"1" + b"}" * 3000,
    "5,000 digits": b'model = "deit_tiny"\nseed = ' + b"9" * 5000,
    "a part as text": b'model = "deit_tiny"\nplan = "x"\n',
    "a part as a list of tables": b'model = "deit_tiny"\n[[plan]]\nratio = 0.5\n',
    "a key twice": b'model = "a"\nmodel = "b"\n',
    "200,000 keys": b"".join(b"k%d = %d\n" % (i, i) for i in range(200_000)),
    "dotted keys": b"plan.ratio = 0.5\nplan = 3\n", "a lone half of a character": b'model = "\\ud800"\n',
    "inf": b'model = "deit_tiny"\nplan.ratio = inf\n', "carriage returns": b'model = "deit_tiny"\rplan.ratio = 0.5\r',
    "a path to a pipe": b'model = "deit_tiny"\nweights = "/dev/zero"\nplan.ratio = 0.5\n',
    "a latency with a path": b'model = "deit_tiny"\nplan.target_latency = "1/../../x ms"\n',
}  # fmt: skip


def _recipe(command: str, what: str, text: bytes) -> Case:
    def arrange(here: Path) -> Arguments:
        (here / "r.toml").write_bytes(text)
        cuts = ["--ratios", "0.5"] if command == "sweep" else []
        return [command, "--recipe", here / "r.toml", *cuts]

    return Case(f"{command}, recipe: {what}", arrange)
