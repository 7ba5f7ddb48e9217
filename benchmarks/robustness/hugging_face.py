"""Data sets of Hugging Face from strangers: columns that would start programs, documents that lead elsewhere."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from benchmarks.robustness.case import CUT, SIDE, Arguments, Case, Ground
from benchmarks.robustness.mutations import DAMAGES, mutated, no_documents, shown, written

_EACH = 25
_DOCUMENTS = ("state.json", "dataset_info.json")
_TABLE = "data-00000-of-00001.arrow"
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
_PLACES = ("http://localhost:1/x.parquet", "hf://datasets/a/b/c.parquet", "s3://a/b.parquet", "../../precious/*",
           "/etc/*", "zip://a::http://localhost:1/b.zip", "file:///etc/passwd")  # fmt: skip
_CARDS = ("configs: 3", "configs:\n- 3",
          "a: !!python/object/apply:os.system ['touch MARKER']", "a: &a [*a]", "dataset_info:\n  features: 3",
          "dataset_info:\n  features:\n  - name: label\n    dtype: nothing")  # fmt: skip


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """Columns with a script for Ghostscript, which lies in wait on the PATH; documents with one change; cards."""
    if find_spec("datasets") is None:
        return
    environment = {"PATH": f"{ground.case}/bin:{os.environ['PATH']}", "HF_HUB_OFFLINE": None}
    for column in ("image", "label", "mask"):
        yield Case(f"a script as {column}", functools.partial(_script, column), environment=environment)
    saved = _saved(ground)
    for name in _DOCUMENTS:
        document = json.loads((saved / name).read_text())
        for _ in range(_EACH):
            what, changed = mutated(document, random)
            yield _with(saved, name, what, written(changed))
        for what, raw in no_documents((saved / name).read_bytes()).items():
            yield _with(saved, name, what, raw)
        for entry in ({"names_file": "/dev/zero"}, {"num_classes": 10**12}):
            changed = {**document, "features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", **entry}}}
            yield _with(saved, name, shown(entry), written(changed))
    for name in (*_DOCUMENTS, _TABLE):
        for damage in DAMAGES:
            yield Case(f"{name} {damage}", functools.partial(_damaged, saved, name, damage))
    for text in (*(f"configs:\n- config_name: a\n  data_files: '{place}'" for place in _PLACES), *_CARDS):
        yield Case(f"card {shown(text)}", functools.partial(_card, ground, text), environment=environment)


def _planned(folder: Path) -> Arguments:
    sizes = ["--weights", "random", "--image-size", str(SIDE), "--method", "magnitude"]
    return ["plan", *CUT, *sizes, "--data", f"hfds:{folder}"]


def _picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def _write(folder: Path, **columns: tuple[list[Any], Any]) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({name: kind for name, (_, kind) in columns.items()})
    values = {name: values for name, (values, _) in columns.items()}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(folder))


def _saved(ground: Ground) -> Path:
    """A small set; made once."""
    import datasets

    folder = ground.work / "given" / "saved"
    if not folder.exists():
        pictures = [{"bytes": _picture(), "path": None}] * 8
        _write(folder, image=(pictures, datasets.Image()), label=([0, 1] * 4, datasets.ClassLabel(names=["a", "b"])))
    return folder


def _script(column: str, here: Path) -> Arguments:
    import datasets

    (here / "bin").mkdir()
    (here / "bin/gs").write_text(f"#!/bin/sh\ntouch {here}/MARKER\n")
    (here / "bin/gs").chmod(0o755)
    pictures = {
        name: [{"bytes": _EPS if name == column else _picture(), "path": None}] * 8 for name in ("image", "mask")
    }
    labels: tuple[list[Any], Any] = ([0, 1] * 4, datasets.ClassLabel(names=["a", "b"]))
    if column == "label":
        labels = ([{"bytes": _EPS, "path": None}] * 8, datasets.Image())
    columns = {name: (values, datasets.Image()) for name, values in pictures.items()}
    _write(here / "set", **columns, label=labels)
    return [*_planned(here / "set"), "--image-column", "image", "--label-column", "label"]


def _with(saved: Path, name: str, what: str, raw: bytes) -> Case:
    def arrange(here: Path) -> Arguments:
        folder = Path(shutil.copytree(saved, here / "set"))
        (folder / name).write_bytes(raw)
        return _planned(folder)

    return Case(f"{name}: {what}", arrange)


def _damaged(saved: Path, name: str, damage: str, here: Path) -> Arguments:
    folder = Path(shutil.copytree(saved, here / "set"))
    DAMAGES[damage](folder / name)
    return _planned(folder)


def _card(ground: Ground, text: str, here: Path) -> Arguments:
    folder = Path(shutil.copytree(ground.photos, here / "set"))
    (folder / "README.md").write_text(f"---\n{text}\n---\n")
    return _planned(folder)
