"""Runs from strangers: what is handed over runs nothing of theirs, and nothing outside of the folder is touched."""

import ast
import functools
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

from tests.deploy.handover.conftest import MakeRun, report_of
from tests.deploy.report.sample_report import answers
from upvits.calib_data.errors import UserError
from upvits.deploy.choices import BatchProfile
from upvits.deploy.handover import placing
from upvits.deploy.handover.package import package
from upvits.deploy.handover.texts import Subject, example_files, model_card, readme, requirements, shortened
from upvits.deploy.handover.triton import Port, config_text, write_repository
from upvits.deploy.measure.document import Environment
from upvits.deploy.runtimes.interface import Engine
from upvits.deploy.store.artifacts import MANIFEST, file_digest, run_stage

ENGINE = "5-engine/onnxruntime-fp32"
PAYLOADS = (
    '"); __import__("os").system("touch MARKER"); ("',
    '\'\'\'"""\nimport os; os.system(\'touch MARKER\')\n"""',
    "1.0\n--index-url http://localhost:1/\nevil",
    "../../escaped",
    "/escaped",
    "\x1b[2J",
    "..",
    "",
)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Files beside the runs that nobody may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.txt").write_text("secret")
    return folder


def edited(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def resealed(folder: Path) -> None:
    """Let the manifest say what is in the folder, as whoever made it can."""

    def change(manifest: Any) -> None:
        for name, entry in manifest["files"].items():
            entry |= {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size}

    edited(folder / MANIFEST, change)


def _set(entry: str, value: Any, document: dict[str, Any]) -> None:
    document[entry] = value


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(run: Path, outside: Path) -> str:
    """The message of a package that is refused, with everything around it as it was."""
    before = tree(outside.parent)
    names = sorted(path.name for path in run.parent.iterdir())
    with pytest.raises(UserError) as error:
        package(run)
    assert tree(outside.parent) == before
    assert sorted(path.name for path in run.parent.iterdir()) == names
    return str(error.value)


def subject_of(engines: tuple[tuple[Engine, str], ...] = (), name: str = "images", **report: Any) -> Subject:
    image, answer = Port(name, onnx.TensorProto.FLOAT, (3, 32, 32)), Port(name, onnx.TensorProto.FLOAT, (7,))
    preprocess: dict[str, Any] = {
        "mean": [0.5],
        "std": [0.5],
        "interpolation": "bilinear",
        "crop_mode": "center",
        "resize": 32,
        "size": 32,
    }
    document = report_of([], {}, []).model_copy(update=report)
    return Subject(
        report=document, recipe={}, engines=engines, image=image, answer=answer, labels=("a",), preprocess=preprocess,
        stock_timm=False, triton=(), triton_plan=False,
    )  # fmt: skip


def engine_of(**values: Any) -> Engine:
    entries: dict[str, Any] = {
        "folder": Path("x"), "runtime": "onnxruntime", "precision": "fp32", "targets": (), "file": "model.onnx",
        "bytes": 1, "seconds": 1.0, "sha256": "", "library": "onnxruntime", "library_version": "1.2.3",
        "onnx_sha256": "", "batch": BatchProfile(), "settings": {"provider": "CPUExecutionProvider"},
    }  # fmt: skip
    return Engine.model_validate({**entries, **values})


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("entry", ["runtime", "precision", "file", "library", "library_version", "targets", "more"])
def test_records_of_engines_hold_plain_names_only(entry: str, payload: str) -> None:
    values: dict[str, Any] = {"targets": (payload,), "more": {payload: ""}}
    with pytest.raises(ValueError, match=entry):
        engine_of(**{entry: values.get(entry, payload)})


@pytest.mark.parametrize("entry", ["runtime", "precision", "file", "library_version"])
def test_a_record_with_a_payload_is_refused(make_run: MakeRun, outside: Path, entry: str) -> None:
    run = make_run()
    for payload in ("../../../../outside/x", str(outside / "x"), 'x"); import os #', "1.0\nevil"):
        edited(run / ENGINE / "pruned/build.json", functools.partial(_set, entry, payload))
        resealed(run / ENGINE)
        assert "build.json is not valid" in refused(run, outside)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_examples_are_quoted_python(payload: str) -> None:
    settings = {"provider": "CUDAExecutionProvider", payload: payload}
    device = {"device": payload, "inference_precision": payload}
    engines = (
        (engine_of(settings=settings), payload),
        (engine_of(runtime="openvino", library="openvino", settings=device), payload),
        (engine_of(runtime="tensorrt", library="tensorrt"), payload),
    )
    scripts = example_files(subject_of(engines, name=payload))
    assert len(scripts) == 3
    for name, text in scripts.items():
        harmless = ast.parse(example_files(subject_of(tuple((e, "x") for e, _ in engines), name="x"))[name])
        made = ast.parse(text)
        assert [type(node) for node in ast.walk(made)] == [type(node) for node in ast.walk(harmless)]
        assert payload in [node.value for node in ast.walk(made) if isinstance(node, ast.Constant)]


def test_requirements_take_versions_only() -> None:
    for release in ("1.2.3", "10.13.3.9.post1", "1.24.0.dev20251101", "2.0rc1"):
        lines = requirements(subject_of(((engine_of(library_version=release), "x"),)))["requirements/onnxruntime.txt"]
        assert f"onnxruntime=={release}" in lines.splitlines()
    for release in ("1.0-evil", "1.0_x"):
        lines = requirements(subject_of(((engine_of(library_version=release), "x"),)))["requirements/onnxruntime.txt"]
        assert lines.splitlines()[0] == "onnxruntime"
    assert (
        "onnxruntime==1.2.3\n"
        in requirements(subject_of(((engine_of(library_version="1.2.3+cu130"), "x"),)))["requirements/onnxruntime.txt"]
    )


def test_documents_show_text_as_text() -> None:
    payload = "<script>alert(1)</script> ![x](http://localhost/x) | `code` \x1b[2J\n# title"
    here = Environment(cpu=payload, libraries={payload: "1"})
    texts = subject_of(model=payload, notes=[payload], weights=payload, environment=here)
    for text in (model_card(texts), readme(texts)):
        assert not any(letter in text for letter in "\x1b\x9b")
        for live in ("<script", "![x](", " | `code`", "\n# title"):
            assert live not in text.replace(f"\\{live.strip()}", ""), live
        assert "\\<script\\>alert(1)\\</script\\> !\\[x\\](http://localhost/x) \\| \\`code\\`" in text


@pytest.mark.parametrize("payload", ['a" } evil { "', "a\\", "a\nb", "größe"])
def test_names_are_quoted_for_triton(payload: str) -> None:
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    port = Port(payload, onnx.TensorProto.FLOAT, (3, 32, 32))
    text = config_text("m", "onnxruntime", port, port, BatchProfile(), labelled=False)
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert [entry.name for entry in (*config.input, *config.output)] == [payload, payload]
    assert text.isascii()


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "", "a\nb", ".hidden"])
def test_models_for_triton_have_plain_names(name: str, tmp_path: Path) -> None:
    port = Port("images", onnx.TensorProto.FLOAT, (3, 32, 32))
    with pytest.raises(UserError, match="no name for a model"):
        write_repository(tmp_path / "deep/triton", name, [], None, port, port, BatchProfile(), None)
    assert list(tmp_path.iterdir()) == []


def test_a_model_name_that_leads_outside_is_refused(make_run: MakeRun, outside: Path) -> None:
    run = make_run()
    edited(run / "report.json", lambda report: report.update(model="../../../outside/x"))
    assert "no name for a model" in refused(run, outside)


@pytest.mark.parametrize("name", ["pruned/../../../../outside/secret.txt", "/etc/hostname", "model/../../x"])
@pytest.mark.parametrize("stage", ["3-distill", "4-export", ENGINE])
def test_manifests_name_files_of_their_folder_only(make_run: MakeRun, outside: Path, stage: str, name: str) -> None:
    run = make_run()
    secret = outside / "secret.txt"
    entry = {"sha256": file_digest(secret), "bytes": secret.stat().st_size}
    edited(run / stage / MANIFEST, lambda manifest: manifest["files"].update({name: entry}))
    assert "is missing, or a file in it was changed" in refused(run, outside)


@pytest.mark.parametrize(
    "place",
    [
        "3-distill/model/config.json",
        "4-export/pruned/model.onnx",
        f"{ENGINE}/pruned/build.json",
        "report.json",
        "4-export",
    ],
)
def test_links_that_lead_out_are_refused(make_run: MakeRun, outside: Path, place: str) -> None:
    run = make_run()
    shutil.move(run / place, outside / "moved")
    (run / place).symlink_to(outside / "moved")
    assert "is outside of" in refused(run, outside)


def test_pages_of_the_run_are_not_handed_over(make_run: MakeRun) -> None:
    run = make_run()
    (run / "report.html").write_text("<script>alert(1)</script>")
    assert "alert(1)" not in (package(run) / "report.html").read_text()


@pytest.mark.parametrize("path", ["x", "../x", "5-engine/x", "3-distill/model/config.json", "5-engine/../a/b/c"])
def test_engines_lie_where_stages_put_them(make_run: MakeRun, outside: Path, path: str) -> None:
    run = make_run(measured={})
    edited(run / "report.json", lambda report: report["engines"][0].update(path=path))
    refused(run, outside)


def test_an_engine_that_is_another_one_is_refused(make_run: MakeRun, outside: Path) -> None:
    run = make_run(measured={})
    edited(run / "report.json", lambda report: report["engines"].append(report["engines"][0]))
    assert "another engine than report.json says" in refused(run, outside)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"labels": "{"}, "labels in the metadata"),
        ({"labels": "7"}, "labels in the metadata"),
        ({"labels": "[" * 100_000}, "labels in the metadata"),
        ({"crop_pct": "0"}, "is not valid"),
        ({"mean": '["x"]'}, "is not valid"),
        ({"interpolation": "'); evil"}, "is not valid"),
        ({"input_size": "[3, 1e9, 1e9]"}, "is not valid"),
    ],
)
def test_metadata_of_the_onnx_file_is_checked(
    make_run: MakeRun, outside: Path, metadata: dict[str, str], message: str
) -> None:
    run = make_run()
    path = run / "4-export/pruned/model.onnx"
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {entry.key: entry.value for entry in proto.metadata_props} | metadata)
    onnx.save(proto, path)
    resealed(run / "4-export")
    assert message in refused(run, outside)


def test_labels_are_one_line_each_and_printed_plainly(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "4-export/pruned/model.onnx"
    proto = onnx.load(path)
    labels = ["a\nb", "\x1b[2Jc", '"""', "{{ x }}", "d\u2028e", "f", "g"]
    onnx.helper.set_model_props(
        proto, {entry.key: entry.value for entry in proto.metadata_props} | {"labels": json.dumps(labels)}
    )
    onnx.save(proto, path)
    resealed(run / "4-export")
    folder = package(run)
    names = ["a b", "\x1b[2Jc", '"""', "{{ x }}", "d e", "f", "g"]
    assert json.loads((folder / "labels.json").read_text()) == names
    assert (folder / "triton/deit_tiny_onnx/labels.txt").read_text() == "".join(f"{name}\n" for name in names)
    picture = folder / "picture.png"
    Image.new("RGB", (32, 32)).save(picture)
    command: list[str | Path] = [sys.executable, folder / "run_onnxruntime.py", picture]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    for script in folder.glob("run_*.py"):
        ast.parse(script.read_text())


def test_weights_of_the_onnx_file_outside_of_it_are_refused(make_run: MakeRun, outside: Path) -> None:
    run = make_run()
    path = run / "4-export/pruned/model.onnx"
    proto = onnx.load(path)
    tensor = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (outside / "weights").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../outside/weights")
    path.write_bytes(proto.SerializeToString())
    resealed(run / "4-export")
    refused(run, outside)


def test_paths_are_shortened_in_whole_parts_only() -> None:
    names = {"/d": "d", "/srv/a": "a", "/srv/a/b": "b"}
    texts = ["imagefolder:/d", "/d/x.png, /data", "x/d", "</d", "/d.png", "see /srv/a/b/c and /srv/a.", "a~/d", "(/d)"]
    right = ["imagefolder:d", "d/x.png, /data", "x/d", "</d", "/d.png", "see b/c and a.", "a~/d", "(d)"]
    assert shortened({"k": [texts, 1, None]}, names) == {"k": [right, 1, None]}


def test_validation_images_stay_at_home(make_run: MakeRun) -> None:
    run = make_run()
    edited(run / "report.json", lambda report: report.update(answers=answers()))
    folder = package(run)
    assert "image/jpeg" not in (folder / "report.html").read_text()
    assert answers()["samples"][0]["image"] not in (folder / "report.json").read_text()
    assert "Accuracy of every class" in (folder / "report.html").read_text()


@pytest.mark.parametrize("data", ["/d", "/"])
def test_a_short_folder_of_images_leaves_the_page_whole(make_run: MakeRun, data: str) -> None:
    run = make_run()
    whole = (package(run) / "report.html").read_text()
    edited(run / "report.json", lambda report: report.update(data=f"imagefolder:{data}"))
    recipe = (run / "recipe.toml").read_text().splitlines()
    lines = [f'data = "imagefolder:{data}"' if line.startswith("data =") else line for line in recipe]
    (run / "recipe.toml").write_text("\n".join(lines))
    page = (package(run) / "report.html").read_text()
    for tag in ("div", "section", "table", "td", "tr", "span", "style", "script", "html"):
        assert page.count(f"</{tag}>") == whole.count(f"</{tag}>")


def test_files_of_a_package_can_be_read_by_others(make_run: MakeRun) -> None:
    before = os.umask(0o022)
    try:
        folder = package(make_run())
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "model")} == {0o755}


@pytest.mark.parametrize("out", ["/proc/x", "/dev/full/x", "/", "x" * 300])
def test_places_where_no_folder_can_be_made_are_refused(make_run: MakeRun, outside: Path, out: str) -> None:
    run = make_run()
    with pytest.raises(UserError):
        package(run, outside / out)
    assert tree(outside).keys() == {"secret.txt"}


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_package_is_there_at_every_moment_of_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    out = tmp_path / "out"

    def place(text: str) -> None:
        with placing.draft_of(out) as draft:
            (draft / "text").write_text(text)
            placing.put_in_place(draft, out)

    if not exchange:
        monkeypatch.setattr(placing, "_exchanged", lambda *_: False)
    place("old")
    place("new")
    assert tree(tmp_path) == {"out/text": b"new"}
    assert os.listdir(tmp_path) == ["out"]
    rename = Path.rename
    left = iter([True, False])

    def killed(path: Path, target: Path) -> Path:
        if not next(left):
            monkeypatch.setattr(Path, "rename", rename)
            raise Killed
        return rename(path, target)

    if not exchange:
        monkeypatch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            place("newer")
        assert tree(tmp_path) == {"out/text": b"new"}
        assert os.listdir(tmp_path) == ["out"]


def test_what_killed_packages_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.work-dead").mkdir()
    (tmp_path / ".out.work-dead/half").write_text("")
    (tmp_path / ".out.work-gone-old").mkdir()
    (tmp_path / ".out.work-gone-old/text").write_text("the only one")
    with placing.draft_of(out) as theirs, placing.draft_of(out):
        assert theirs.is_dir()
        assert (out / "text").read_text() == "the only one"
    assert os.listdir(tmp_path) == ["out"]


def test_a_stage_is_not_written_through_links(tmp_path: Path, outside: Path) -> None:
    run = tmp_path / "run"
    (outside / ".hidden").write_text("mine")
    before = tree(outside)
    write = functools.partial(_write, text="made")
    key = run_stage(run, "1-x", {}, {}, write).manifest.key[:16]
    shutil.rmtree(run / "1-x")
    for resumable in (True, False):
        (run / f".1-x.work-{key}").symlink_to(outside)
        run_stage(run, "1-x", {}, {}, write, resumable=resumable)
        assert tree(outside) == before
        assert tree(run).keys() == {"1-x/text", f"1-x/{MANIFEST}"}
        shutil.rmtree(run / "1-x")
    (run / f".1-x.work-{key}").mkdir()
    (run / f".1-x.work-{key}/text").symlink_to(outside / "secret.txt")
    run_stage(run, "1-x", {}, {}, write, resumable=True)
    assert tree(outside) == before
    (run / "5-engine").symlink_to(outside)
    with pytest.raises(UserError, match="is outside of"):
        run_stage(run, "5-engine/x", {}, {}, write)
    assert tree(outside) == before


def _write(folder: Path, text: str) -> None:
    (folder / "text").write_text(text)
