"""Whatever stands in a document, its reader gives a valid object or one message, and who uses the object goes on."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.deploy.report.sample_report import sample_document, sample_report
from upvits import toolchain
from upvits.calib_data import demo_weights
from upvits.calib_data.documents import parse_document, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.shards import _Info
from upvits.deploy.detectors.predictions import read_detections
from upvits.deploy.recipe.document import make_recipe
from upvits.deploy.report.document import Report, load_report
from upvits.deploy.report.runs import compare_runs
from upvits.deploy.report.verdict import verdict
from upvits.deploy.report.views import html, markdown, terminal
from upvits.deploy.report.views.runs import comparison_html
from upvits.deploy.runtimes.engine_folder import read_engine
from upvits.deploy.store.artifacts import Manifest, open_artifact
from upvits.deploy.store.run_dir import read_recipe
from upvits.detection.coco import read_annotations
from upvits.detection.config_check import check_detector_config
from upvits.toolchain.networks.config_document import arguments_of, read_config
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.scores import Scores

DEEP: Any = 0
for _ in range(300):
    DEEP = [DEEP]


@dataclass(frozen=True)
class Kind:
    """A kind of document: the name of its file, a valid one, and what reads and uses it in a folder."""

    file: str
    valid: Any
    use: Callable[[Path], object]


def use_report(folder: Path) -> None:
    report = load_report(folder)
    verdict(report), markdown(report), html(report), terminal(report)
    comparison_html(compare_runs({"a": report, "b": sample_report()}))
    Report.model_validate_json(report.model_dump_json())


def use_plan(folder: Path) -> None:
    plan = PruningPlan.load(folder / "plan.json")
    assert plan.widths.channels
    for told in (plan.changes, plan.components, plan.requested, plan.to_json()):
        str(told)


def use_config(folder: Path) -> None:
    arguments_of(read_config(folder))


def use_detector(folder: Path) -> None:
    document = read_document(folder / "detector.json", dict[str, Any], fix="Get another.")
    check_detector_config(document, "detector.json")


def use_recipe(folder: Path) -> None:
    make_recipe(read_recipe(folder))


def plan_document() -> Any:
    model = toolchain.create_model("pvt_v2_b0", weights="demo")
    plan = toolchain.plan(model, toolchain.score(model, method="magnitude"), ratio=0.5)
    document = json.loads(plan.to_json())
    return {**document, "keep": dict(list(document["keep"].items())[:3])}


def engine_document() -> Any:
    return {
        "format_version": 2, "runtime": "onnxruntime", "precision": "fp32", "targets": ["sm86"], "file": "model.onnx",
        "bytes": 4, "seconds": 1.5, "sha256": "ab", "library": "onnxruntime", "library_version": "1.23.0",
        "onnx_sha256": "cd", "batch": {"min": 1, "opt": 8, "max": 32}, "settings": {"intra_op_threads": 2},
        "built": None, "more": {"model.onnx.data": "ef"},
    }  # fmt: skip


def manifest_document() -> Any:
    entry = {"sha256": "0" * 64, "bytes": 3}
    return json.loads(
        Manifest(stage="1-score", stage_version=1, key="k", settings={"a": [1, 2]}, inputs={"x": "y"}, files={},
                 created="now", seconds=1.0, peak_rss_mb=2.0, versions={}).model_dump_json()
    ) | {"files": {"score.json": entry}}  # fmt: skip


def score_document() -> Any:
    return {
        "format": 1, "method": "fisher", "unit": "nats", "num_images": 8, "seed": 0, "model_digest": "a",
        "data_digest": None, "depth": {"blocks": {"steps": [[[0, 0], [1, 2]]], "loss": [0.5]}},
        "stability": {"blocks.0.mlp": {"spearman": 0.5, "overlap": 0.9, "kept": 4}},
    }  # fmt: skip


def coco_document() -> Any:
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3.0, 4], "area": 12.0, "iscrowd": 0,
           "segmentation": [[1, 2, 3, 4, 5, 6]]}  # fmt: skip
    image = {"id": 1, "file_name": "a.png", "width": 64, "height": 64.0}
    return {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}


def config_document() -> Any:
    folder = demo_weights("pvt_v2_b0")
    assert folder is not None
    return json.loads((folder / "config.json").read_text())


KINDS = {
    "report": Kind("report.json", sample_document(), use_report),
    "plan": Kind("plan.json", plan_document(), use_plan),
    "engine": Kind("build.json", engine_document(), read_engine),
    "manifest": Kind("manifest.json", manifest_document(), open_artifact),
    "scores": Kind("score.json", score_document(), Scores.load),
    "config": Kind("config.json", config_document(), use_config),
    "coco": Kind("annotations.json", coco_document(), lambda folder: read_annotations(folder / "annotations.json")),
    "shards": Kind("_info.json", {"splits": {"train": {"filenames": ["a.tar"]}}, "class_names": ["cat"]},
                   lambda folder: read_document(folder / "_info.json", _Info, fix="Repair it.")),
    "detections": Kind("predictions.json", [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "score": 0.5}],
                       read_detections),
    "detector": Kind("detector.json", {"type": "RetinaNet", "backbone": {"type": "UPPVTv2", "model": {}},
                                       "bbox_head": {"type": "RetinaHead", "num_classes": 3}}, use_detector),
    "recipe": Kind("recipe.toml", {"model": "pvtv2_b0", "plan": {"ratio": 0.5}, "bench": {"batches": [1, 8]},
                                   "engine": {"runtime": "auto", "batch": "1:8:32"}, "seed": 3}, use_recipe),
}  # fmt: skip

ODD = st.sampled_from([
    None, True, -1, 0, 10**17, -(10**17), 10**30, 1e300, -1e300, 1e-320, float("nan"), float("inf"), "", "x" * 200_000,
    "\0", "\u202e\x1b[31m", "../../etc/passwd", "/etc/passwd", "²", "1" * 5000, [], {}, [[]], [None], {"": None}, DEEP,
    [1, 2, 3], {"b1": 1}, "b9",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document; of long lists, the first entries."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*path, key)
        yield from places(below, (*path, key))


def changed(document: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """A copy in which one entry is another, is gone, or has another name."""
    result = copy.deepcopy(document)
    *before, last = path
    place = result
    for key in before:
        place = place[key]
    if how == "set":
        place[last] = value
    elif how == "remove":
        del place[last]
    elif isinstance(place, dict):
        place[str(value)[:2000]] = place.pop(last)
    return result


def written(kind: Kind, document: Any) -> bytes:
    if kind.file.endswith(".toml"):
        return tomli_w.dumps(document).encode("utf-8", "surrogatepass")
    return json.dumps(document).encode("utf-8", "surrogatepass")


def tried(kind: Kind, content: bytes, folder: Path) -> None:
    (folder / kind.file).write_bytes(content)
    with suppress(UserError):
        kind.use(folder)


@pytest.mark.parametrize("name", KINDS)
def test_the_valid_documents_are_valid(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    (tmp_path / kind.file).write_bytes(written(kind, kind.valid))
    if name in ("engine", "scores"):  # what would lie beside it is missing
        with pytest.raises(UserError, match=r"no engine file|scores\.safetensors"):
            kind.use(tmp_path)
    else:
        kind.use(tmp_path)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_document_with_one_odd_entry_is_valid_or_one_message(name: str, tmp_path: Path, data: st.DataObject) -> None:
    kind = KINDS[name]
    path = data.draw(st.sampled_from(list(places(kind.valid))))
    how = data.draw(st.sampled_from(["set", "set", "set", "remove", "rename"]))
    try:
        content = written(kind, changed(kind.valid, path, how, data.draw(ODD | JSON)))
    except (TypeError, RecursionError, ValueError):  # TOML has no None
        return
    tried(kind, content, tmp_path)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON)
def test_any_json_is_a_valid_document_or_one_message(name: str, tmp_path: Path, value: Any) -> None:
    tried(KINDS[name], json.dumps(value).encode("utf-8", "surrogatepass"), tmp_path)


BROKEN = {
    "nothing": b"", "half": b'{"model": ', "null": b"null", "bytes": b'{"model": "\xff\xfe"}', "nul": b"\0" * 100,
    "half a character": b'{"model": "\\ud800"}', "digits": b'{"model": ' + b"9" * 5_000 + b"}",
    "deep": b"[" * 100_000, "deep objects": b'{"model":' * 100_000, "many": b"[" + b"{}," * 1_500_000 + b"1]",
    "many of one name": b"{" + b'"":0,' * 1_000_000 + b'"":0}', "hexadecimal": b"seed = 0x" + b"f" * 5_000,
    "deep TOML": b"seed = " + b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_one_message(name: str, broken: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    (tmp_path / kind.file).write_bytes(BROKEN[broken])
    if name == "manifest":
        assert open_artifact(tmp_path) is None  # the stage is done again
        return
    if (name, broken) == ("shards", "many of one name"):  # an entry of no interest
        kind.use(tmp_path)
        return
    with pytest.raises(UserError) as refusal:
        kind.use(tmp_path)
    assert len(str(refusal.value)) < 2_000


@pytest.mark.parametrize("name", KINDS)
def test_a_pipe_or_a_device_in_place_of_a_document_is_not_opened(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / kind.file)
        if name == "manifest":
            assert open_artifact(tmp_path) is None
        else:
            with pytest.raises(UserError):
                kind.use(tmp_path)
        (tmp_path / kind.file).unlink()


def test_a_document_of_another_version_says_so() -> None:
    with pytest.raises(UserError, match="written by another version") as refusal:
        parse_document('{"format_version": 7}', "report.json", Report, fix="Use that one.")
    assert refusal.value.why == "Its format_version is 7."


def test_many_faults_take_little_memory(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from upvits.deploy.report.document import load_report\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in sys.argv[1:]:\n"
        "    try: load_report(Path(name))\n"
        "    except Exception as error: print(type(error).__name__)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    contents = {
        "engines": '{"engines": [' + "{}," * 20_000 + "{}]}",
        "notes": '{"notes": [' + "0," * 450_000 + "0]}",
        "lists": '{"notes": [' + "[]," * 1_500_000 + "0]}",  # 750 MB as faults
    }
    for name, text in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in contents)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    *errors, grown = done.stdout.split()
    assert errors == ["UserError"] * len(contents)
    assert int(grown) < 600


@pytest.mark.parametrize("unit", ["[],", "0,", "{},", "[[[[[[]]]]]],", '"",', '{"a":0},'])
def test_large_documents_that_would_grow_in_memory_are_refused_before_they_are_parsed(
    unit: str, tmp_path: Path
) -> None:
    document = coco_document()
    document["annotations"][0]["segmentation"] = "HERE"
    text = json.dumps(document).replace('"HERE"', f"[{unit * (30_000_000 // len(unit))}0]")
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(UserError, match="is not valid") as refusal:
        read_annotations(tmp_path / "annotations.json")
    assert refusal.value.why == "It has far more brackets and commas than anything else."


def test_large_documents_are_held_against_the_memory_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = coco_document()
    box = {**document["annotations"][0], "segmentation": [[round(7.31 * index, 2) for index in range(80)]]}
    content = json.dumps({**document, "annotations": [box] * 20_000})  # as in COCO: 11 MB
    (tmp_path / "annotations.json").write_text(content)
    assert len(read_annotations(tmp_path / "annotations.json").annotations) == 20_000
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=80_000_000))
    with pytest.raises(UserError, match="too large for this machine") as refusal:
        read_annotations(tmp_path / "annotations.json")
    assert refusal.value.why.endswith("GB of memory, and 0.1 GB are free.")
