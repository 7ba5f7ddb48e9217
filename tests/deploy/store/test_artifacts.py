"""Stages are made once, made again when anything differs, and never half there."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upvits.calib_data.errors import UserError
from upvits.deploy.store.artifacts import (
    MANIFEST,
    Artifact,
    Manifest,
    PeakMemory,
    atomic_write,
    canonical_digest,
    file_digest,
    open_artifact,
    run_stage,
    stage_key,
)
from upvits.deploy.store.disk import disk_errors, is_disk_full

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


class Work:
    """A stage's work that counts its runs and writes what it is told."""

    def __init__(self, **files: str) -> None:
        self.files = files or {"result.txt": "42"}
        self.runs = 0

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        for name, text in self.files.items():
            (folder / name).write_text(text)


def stage(run_dir: Path, work: Callable[[Path], None], **settings: object) -> Artifact:
    return run_stage(run_dir, "2-prune", settings, {"scores": "abc"}, work)


def hidden(run_dir: Path) -> list[str]:
    """Everything below a run directory that is not a stage under its final name."""
    return sorted(p.name for p in run_dir.iterdir() if p.name != "2-prune")


def reordered(value: object) -> object:
    """The same JSON value with every object's keys in the opposite order."""
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_key_ignores_the_order_of_settings(value: object) -> None:
    assert canonical_digest(reordered(value)) == canonical_digest(value)


@given(JSON, JSON)
def test_key_tells_any_two_settings_apart(one: object, other: object) -> None:
    # 1, 1.0 and True are equal in Python and different in JSON, so the comparison is of their spelling.
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (canonical_digest({"x": one}) == canonical_digest({"x": other})) == same


@given(st.dictionaries(st.text(max_size=6), JSON, min_size=1, max_size=4), st.data())
def test_key_changes_with_every_single_value(settings: dict[str, object], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(settings)))
    changed = {**settings, name: [settings[name]]}
    assert stage_key("s", 1, changed, {}) != stage_key("s", 1, settings, {})


def test_key_changes_with_stage_version_and_inputs() -> None:
    keys = {
        stage_key("a", 1, {}, {"in": "x"}),
        stage_key("b", 1, {}, {"in": "x"}),
        stage_key("a", 2, {}, {"in": "x"}),
        stage_key("a", 1, {}, {"in": "y"}),
        stage_key("a", 1, {"in": "x"}, {}),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("value", [{1: "x"}, math.nan, math.inf, Path("x"), {1, 2}, np.float32(1), b"x"])
def test_key_refuses_what_has_no_exact_json_form(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_digest({"x": value})


def test_a_stage_runs_once_and_records_what_it_took(tmp_path: Path) -> None:
    work = Work(**{"model.bin": "weights"})
    first = stage(tmp_path, work, ratio=0.5)
    again = stage(tmp_path, work, ratio=0.5)
    assert work.runs == 1
    assert (first.skipped, again.skipped) == (False, True)
    assert again.digest == first.digest
    assert again.record.model_dump(exclude={"skipped"}) == first.record.model_dump(exclude={"skipped"})
    assert first.manifest.files["model.bin"].bytes == len("weights")
    assert first.manifest.files["model.bin"].sha256 == file_digest(tmp_path / "2-prune/model.bin")
    assert first.manifest.peak_rss_mb > 20
    assert first.manifest.versions["python"].startswith("3.")
    assert hidden(tmp_path) == []


def test_the_manifest_on_disk_is_the_documented_one(tmp_path: Path) -> None:
    artifact = stage(tmp_path, Work(), ratio=0.5)
    written = json.loads((tmp_path / "2-prune" / MANIFEST).read_text())
    assert written["format_version"] == 1
    assert written["settings"] == {"ratio": 0.5}
    assert Manifest.model_validate(written) == artifact.manifest


def test_changed_settings_replace_the_folder_as_a_whole(tmp_path: Path) -> None:
    before = stage(tmp_path, Work(a="1", b="2"), ratio=0.5)
    after = stage(tmp_path, Work(a="3"), ratio=0.25)
    assert after.digest != before.digest
    assert sorted(p.name for p in (tmp_path / "2-prune").iterdir()) == ["a", MANIFEST]
    assert hidden(tmp_path) == []


def test_the_old_result_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    stage(tmp_path, Work(a="1"), ratio=0.5)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        stage(tmp_path, fail, ratio=0.25)
    assert (tmp_path / "2-prune/a").read_text() == "1"
    assert hidden(tmp_path) == []


def test_files_that_the_user_put_there_are_set_aside(tmp_path: Path) -> None:
    stage(tmp_path, Work(a="1"), ratio=0.5)
    (tmp_path / "2-prune/notes.txt").write_text("mine")
    stage(tmp_path, Work(a="2"), ratio=0.25)
    assert (tmp_path / "2-prune.replaced-1/notes.txt").read_text() == "mine"
    assert not (tmp_path / "2-prune/notes.txt").exists()


def test_files_that_the_user_changed_are_set_aside(tmp_path: Path) -> None:
    stage(tmp_path, Work(a="1", b="2"), ratio=0.5)
    (tmp_path / "2-prune/a").write_text("mine")
    (tmp_path / "2-prune/b").unlink()
    stage(tmp_path, Work(a="1", b="2"), ratio=0.5)
    assert (tmp_path / "2-prune.replaced-1/a").read_text() == "mine"
    assert (tmp_path / "2-prune/a").read_text() == "1"


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("43"),  # same size, other content
        lambda file: file.write_text("4"),
        lambda file: file.unlink(),
        lambda file: (file.parent / MANIFEST).write_text("{"),
        lambda file: (file.parent / MANIFEST).unlink(),
    ],
    ids=["altered", "cut short", "missing", "manifest broken", "manifest missing"],
)
def test_damage_is_found_and_mended(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    work = Work()
    whole = stage(tmp_path, work)
    damage(tmp_path / "2-prune/result.txt")
    assert open_artifact(tmp_path / "2-prune") is None
    mended = stage(tmp_path, work)
    assert work.runs == 2
    assert mended.digest == whole.digest


KILLED = """
import sys, time
from pathlib import Path
from upvits.deploy.store.artifacts import run_stage

def work(folder):
    checkpoint = folder / "epoch.txt"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for epoch in range(done, 4):
        checkpoint.write_text(str(epoch + 1))
        if epoch == 1 and sys.argv[2] == "hang":
            print("halfway", flush=True)
            time.sleep(60)
    (folder / "started-at.txt").write_text(str(done))

settings = {"epochs": int(sys.argv[4])}
print(run_stage(Path(sys.argv[1]), "3-distill", settings, {}, work, resumable=sys.argv[3] == "resumable").skipped)
"""


def killed(run_dir: Path, mode: str, epochs: int = 4) -> None:
    command = [sys.executable, "-c", KILLED, str(run_dir), "hang", mode, str(epochs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halfway\n"
        process.send_signal(signal.SIGKILL)


def finished(run_dir: Path, mode: str, epochs: int = 4) -> str:
    command = [sys.executable, "-c", KILLED, str(run_dir), "go", mode, str(epochs)]
    subprocess.run(command, check=True, capture_output=True)
    return (run_dir / "3-distill/started-at.txt").read_text()


@pytest.mark.parametrize(("mode", "start"), [("resumable", "2"), ("plain", "0")])
def test_kill_9_leaves_no_artifact_and_the_next_run_finishes(tmp_path: Path, mode: str, start: str) -> None:
    killed(tmp_path, mode)
    assert not (tmp_path / "3-distill").exists()
    assert finished(tmp_path, mode) == start
    assert [p.name for p in tmp_path.iterdir()] == ["3-distill"]


def test_checkpoints_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    killed(tmp_path, "resumable", epochs=4)
    assert finished(tmp_path, "resumable", epochs=5) == "0"


def test_killed_between_manifest_and_rename_the_work_is_not_lost(tmp_path: Path) -> None:
    work = Work()
    artifact = stage(tmp_path, work)
    (tmp_path / "2-prune").rename(tmp_path / f".2-prune.work-{artifact.manifest.key[:16]}")
    assert stage(tmp_path, work).skipped
    assert work.runs == 1
    assert hidden(tmp_path) == []


def test_killed_between_the_two_renames_the_new_result_arrives_and_the_old_one_goes(tmp_path: Path) -> None:
    stage(tmp_path, Work(a="old"), ratio=0.5)
    (tmp_path / "2-prune").rename(tmp_path / "2-prune.replaced-1")
    new = stage(tmp_path, Work(a="new"), ratio=0.25)
    (tmp_path / "2-prune").rename(tmp_path / f".2-prune.work-{new.manifest.key[:16]}")
    stage(tmp_path, Work(a="never"), ratio=0.25)
    assert (tmp_path / "2-prune/a").read_text() == "new"
    assert hidden(tmp_path) == []


def test_a_torn_manifest_in_the_work_folder_is_no_part_of_the_result(tmp_path: Path) -> None:
    key = stage_key("2-prune", 1, {}, {"scores": "abc"})
    left = tmp_path / f".2-prune.work-{key[:16]}"
    left.mkdir()
    for name in (MANIFEST, f".{MANIFEST}.x1.tmp", "checkpoint"):
        (left / name).write_text("{")
    artifact = run_stage(tmp_path, "2-prune", {}, {"scores": "abc"}, Work(), resumable=True)
    assert sorted(artifact.manifest.files) == ["checkpoint", "result.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_a_message_and_leaves_nothing(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        (folder / "half").write_text("x")
        with open("/dev/full", "wb") as file:
            file.write(b"x")

    with pytest.raises(UserError, match="no space left") as error:
        stage(tmp_path, work)
    assert "--output" in error.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_a_result_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: it is a folder"), disk_errors(tmp_path, "report"):
        atomic_write(tmp_path / "report.html", b"page")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_full_disk_is_recognised_through_other_libraries_errors() -> None:
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.ENOENT, "No such file"))


def test_a_file_in_the_place_of_the_run_directory_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        stage(tmp_path / "run", Work())


def test_errors_about_files_elsewhere_are_left_alone(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/photo.jpg")

    with pytest.raises(PermissionError):
        stage(tmp_path, work)


def test_atomic_write_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    atomic_write(path, b"old")
    with pytest.raises(TypeError):
        atomic_write(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end() -> None:
    with PeakMemory() as idle:
        pass
    with PeakMemory() as busy:
        block = np.ones(40_000_000)  # 320 MB
        time.sleep(0.2)
        del block
    assert busy.peak_bytes - idle.peak_bytes > 250e6
    with PeakMemory() as after:
        pass
    assert after.peak_bytes < busy.peak_bytes - 200e6  # of the stage, not of the process so far
