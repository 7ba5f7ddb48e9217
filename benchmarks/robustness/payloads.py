"""Texts that would run in a shell, in Python, in a template or on a page, in every place that a stranger can fill."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import onnx

from benchmarks.robustness.case import CHEAP, CUT, SIDE, Arguments, Case, Ground, Outcome
from benchmarks.robustness.documents import reseal, without_markup
from benchmarks.robustness.mutations import MARKUP, TEXTS, shown
from upvits.deploy.store.artifacts import MANIFEST, file_digest

_ENGINE = "5-engine/onnxruntime-fp32"
_SECRET = "TOPSECRET"
_CLASSES = (
    "<script>alert(1)<", "\x1b[31mred", "{{7*7}}", "$(touch MARKER)", "a|b", "`touch MARKER`", '"; import os', "[bold]",
    "\u00e9 \u00fc", "a,b", "'''", "${x}",
)  # fmt: skip
_CFG_OPTIONS = (
    "_base_=evil.py", "model.type=subprocess.call", "custom_imports.imports=['evil']", "load_from=evil.pth",
    "model.backbone.init_cfg.checkpoint=evil.pth", "default_hooks.x.type=os.system", "optim_wrapper.type=os.system",
    "model.data_preprocessor.type=os.system", "env_cfg.mp_cfg={{ fileBasename }}",
    "train_dataloader.dataset.type=os.system", "x={{'a': __import__('os').system('touch MARKER')}}",
)  # fmt: skip
_RUN = 'a run "; touch MARKER; $(touch MARKER) <img src=x onerror=alert(2)> [red]'


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """Runs with payloads, packaged; then texts in options and recipes that name other things."""
    for entry in ("runtime", "precision", "file", "library_version", "library", "targets", "settings", "batch", "more"):
        for text in random.sample(TEXTS, 6):
            change = functools.partial(_engine_entry, entry, text)
            yield _packaged(ground, f"build.json {entry} = {shown(text)}", change)
    paths = ("pruned/../../../victim.txt", "/etc/passwd", "../../victim.txt", "pruned/../../../../precious/notes.txt",
             "a\0b",             "/dev/zero", "", ".", "pruned", "x" * 5000)  # fmt: skip
    for stage in (_ENGINE, "3-distill", "4-export"):
        for path in paths:
            yield _packaged(ground, f"{stage} lists {shown(path)}", functools.partial(_listed, stage, path))
    for at in ("3-distill/model/leak.txt", f"{_ENGINE}/pruned/leak.txt", "report.html", "4-export/pruned/model.onnx",
               "3-distill", "3-distill/model", "recipe.toml", "report.json"):  # fmt: skip
        yield _packaged(ground, f"{at} is a link out", functools.partial(_leak, at))
    for text in TEXTS:
        yield _packaged(ground, f"report.json model = {shown(text)}", functools.partial(_report_entry, "model", text))
        yield _packaged(ground, f"engine path {shown(text)}", functools.partial(_report_entry, "path", text))
    for text in (
        'images"}) + [__import__("os").system("touch MARKER")] #',
        "'''",
        "\x1b[31m",
        "{{7*7}}",
        "a b",
        MARKUP,
    ):
        yield _packaged(ground, f"graph's input called {shown(text)}", functools.partial(_input_name, text))
    yield from _elsewhere(ground)
    yield from _hostile_names(ground)


def _packaged(ground: Ground, what: str, change: Callable[[Path], None]) -> Case:
    """A package of a run that was changed; its example is run."""

    def arrange(here: Path) -> Arguments:
        (here / "victim.txt").write_text(_SECRET)
        change(ground.copy_of_run(here))
        return ["package", here / "run", "-o", here / "package", "--quiet"]

    def check(here: Path, outcome: Outcome) -> list[str]:
        beside = {path.name for path in here.iterdir()} - {"run", "package", "victim.txt"}
        wrong = [f"made beside the package: {sorted(beside)}"] if beside else []
        if (here / "victim.txt").read_text() != _SECRET:
            wrong.append("a file outside of the package was overwritten")
        if outcome.code == 0:
            wrong += _leaked(here / "package") + _examples(ground, here / "package", must_work=False)
        return wrong + without_markup(here / "package", outcome)

    return Case(f"package: {what}", arrange, check=check)


def _leaked(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    wrong = [f"{path.name} holds a file from elsewhere" for path in files if _SECRET.encode() in path.read_bytes()]
    lines = [line for path in files if path.suffix == ".txt" for line in path.read_text(errors="replace").splitlines()]
    if any(line.startswith("--") for line in lines):
        wrong.append("requirements have an option out of the run")
    return wrong


def _examples(ground: Ground, package: Path, *, must_work: bool) -> list[str]:
    """Run the package's own example scripts, as whoever gets the package does."""
    picture = next((ground.photos / "val").rglob("*.png"))
    wrong = []
    for script in package.glob("run_*.py"):
        command = [sys.executable, script.name, str(picture)]
        ended = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=120)
        if must_work and ended.returncode:
            wrong.append(f"{script.name} fails: {ended.stderr[-200:]}")
    return wrong


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _engine_entry(entry: str, text: str, run: Path) -> None:
    path = run / _ENGINE / "pruned/build.json"
    values: dict[str, Any] = {
        "targets": [text],
        "settings": {"provider": text, text: "x"},
        "more": {text: text},
        "batch": {"opt": text},
    }
    before = json.loads(path.read_text())
    _edit(path, lambda document: document.update({entry: values.get(entry, text)}))
    if entry == "file" and text.strip("./") and not {"/", "\0"} & set(text) and len(text) < 200:
        (run / _ENGINE / "pruned" / before["file"]).rename(run / _ENGINE / "pruned" / text)
        manifest = run / _ENGINE / MANIFEST
        _edit(manifest, lambda m: m["files"].update({f"pruned/{text}": m["files"].pop(f"pruned/{before['file']}")}))
    reseal(run, f"{_ENGINE}/pruned/build.json")


def _listed(stage: str, path: str, run: Path) -> None:
    place = run / stage / path if "\0" not in path and len(path) < 200 else run
    digest = file_digest(place) if place.is_file() and path != "/dev/zero" else "0" * 64
    entry = {"sha256": digest, "bytes": place.stat().st_size if place.is_file() else 1}
    _edit(run / stage / MANIFEST, lambda manifest: manifest["files"].update({path: entry}))


def _leak(at: str, run: Path) -> None:
    place = run / at
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.symlink_to(run.parent / "victim.txt")


def _report_entry(entry: str, text: str, run: Path) -> None:
    def change(report: Any) -> None:
        if entry == "path":
            for engine in report["engines"]:
                engine["path"] = text
        else:
            report[entry] = text

    _edit(run / "report.json", change)


def _input_name(text: str, run: Path) -> None:
    path = run / "4-export/pruned/model.onnx"
    model = onnx.load(str(path))
    old, model.graph.input[0].name = model.graph.input[0].name, text
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = text
    path.write_bytes(model.SerializeToString())
    reseal(run, "4-export/pruned/model.onnx")


def _elsewhere(ground: Ground) -> Iterator[Case]:
    """Settings that name models, data and code of others."""
    entries = {
        "plan.like": ("hf-hub:evil/model", "local-dir:/", "../../x", "os.system", "timm/x", "pvt_v2_b0; touch MARKER"),
        "model": ("hf-hub:evil/model", "local-dir:/", "__import__('os').system('touch MARKER')", "torch.hub"),
        "weights": ("hf-hub:evil/model", "http://localhost:1/x.pth", "file:///etc/passwd", "| touch MARKER", "timm:x"),
        "data": ("hfds:evil/data", "torch:os.system", "torch:../x", "torch:__class__", "imagefolder:http://localhost:1/",
                 "wds:pipe:touch MARKER"),
        "precision.calib": ("wds:pipe:touch MARKER", "hfds:../..", "torch:FakeData"),
        "engine.runtime": ("os.system", "onnxruntime;touch MARKER", "/lib/x.so"),
        "device": ("cpu; touch MARKER", "privateuseone"),
    }  # fmt: skip
    for entry, texts in entries.items():
        for text in texts:
            yield Case(f"recipe: {entry} = {shown(text)}", functools.partial(_recipe, ground, entry, text))
    for option in _CFG_OPTIONS:
        yield Case(f"--cfg-options {option}", functools.partial(_cfg_option, ground, option), "refused")


def _recipe(ground: Ground, entry: str, text: str, here: Path) -> Arguments:
    import tomli_w

    *parts, name = entry.split(".")
    document: dict[str, Any] = {
        "model": "deit_tiny",
        "weights": "random",
        "data": f"imagefolder:{ground.photos}",
        "image_size": SIDE,
    }
    place = document
    for part in parts:
        place = place.setdefault(part, {})
    place[name] = text
    if entry != "plan.like":
        document.setdefault("plan", {})["ratio"] = 0.5
    (here / "r.toml").write_text(tomli_w.dumps(document))
    return ["plan", "--recipe", here / "r.toml"]


def _cfg_option(ground: Ground, option: str, here: Path) -> Arguments:
    (here / "evil.py").write_text(f"open({str(ground.marker)!r}, 'w')\n")
    return ["detect", "train", "--run", ground.copy_of_run(here), "--epochs", "1", "--cfg-options", option]


def _hostile_names(ground: Ground) -> Iterator[Case]:
    """A whole job on classes and folders with such names, packaged, and its example run."""

    def arrange(here: Path) -> Arguments:
        pictures = sorted((ground.photos / "train").rglob("*.png"))
        for split, count in (("train", 6), ("val", 2)):
            for number, name in enumerate(_CLASSES):
                (here / "d" / split / name).mkdir(parents=True)
                for index in range(count):
                    picture = pictures[(number * 6 + index) % len(pictures)]
                    shutil.copyfile(picture, here / "d" / split / name / f"{index}.png")
        data = ["--weights", "random", "--image-size", str(SIDE), "--data", f"imagefolder:{here / 'd'}"]
        return ["build", *CUT, *data, *CHEAP, "-o", here / _RUN]

    def check(here: Path, outcome: Outcome) -> list[str]:
        if outcome.code != 0:
            return []
        report = json.loads((here / _RUN / "report.json").read_text())
        wrong = without_markup(here, outcome)
        for line in report["reproduce"]:
            if not line.startswith("pip install ") and not any(
                word.endswith((_RUN, f"{_RUN}/recipe.toml")) for word in shlex.split(line)
            ):
                wrong.append(f"a line to copy is not quoted: {line[:100]}")
        labels = json.loads((here / "package/labels.json").read_text())
        if len(labels) != len(_CLASSES):
            wrong.append("labels.json has other classes")
        return wrong + _examples(ground, here / "package", must_work=True)

    line = f'"$@" && "$1" package {shlex.quote(_RUN)} -o package'
    yield Case("classes and folders with hostile names", arrange, "done", check, shell=line)
