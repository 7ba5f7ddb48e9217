"""Processes that are killed while they write: the next one removes what they left, and never what a living one has."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from upvits.deploy.store.artifacts import atomic_write, whole_file
from upvits.deploy.store.drafts import remove_drafts, remove_work_folders, scratch_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from upvits.deploy.handover.placing import draft_of, put_in_place
from upvits.deploy.store.artifacts import atomic_write, run_stage
from upvits.deploy.store.drafts import scratch_folder
from upvits.deploy.store.run_dir import open_run

def work(folder):
    atomic_write(folder / "a.bin", b"1" * 1000)
    with scratch_folder() as scratch:
        atomic_write(scratch / "b.bin", b"2")

def job(run):
    with open_run(run, {"model": "m"}, ("model",)):
        run_stage(run, "1-score", {}, {}, work)
        for name in ("report.json", "report.md"):
            atomic_write(run / name, b"{}")
    out = run.with_name(run.name + "-package")
    with draft_of(out) as draft:
        atomic_write(draft / "c.bin", b"3")
        put_in_place(draft, out)

def listing(run):
    places = (run, run.with_name(run.name + "-package"), Path(os.environ["TMPDIR"]))
    found = sorted(str(p.relative_to(run.parent)) for place in places for p in place.rglob("*"))
    return [name for name in found if not name.endswith(".lock")], sorted(p.name for p in run.parent.iterdir())

def killed_at(number, run):
    pid = os.fork()
    if pid == 0:
        count = 0
        def counted(call):
            def wrapped(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapped
        os.fsync, os.replace, os.rename, os.chmod = map(counted, (os.fsync, os.replace, os.rename, os.chmod))
        Path.replace, Path.rename = counted(Path.replace), counted(Path.rename)
        job(run)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

root, moments = Path(sys.argv[1]), 0
whole = root / "whole" / "run"
whole.parent.mkdir()
job(whole)
expected = listing(whole)[1]
for number in range(1, 60):
    run = root / str(number) / "run"
    run.parent.mkdir()
    if not killed_at(number, run):
        break
    moments += 1
    job(run)
    got = listing(run)
    assert got[1] == expected, (number, got[1])
    left = [name for name in got[0] if name.endswith(".tmp") or ".work-" in name]
    assert not left, (number, left)
    assert not list(Path(os.environ["TMPDIR"]).iterdir()), number
print(moments)
"""


def test_nothing_of_a_killed_process_stays(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 15


def test_drafts_of_living_processes_and_files_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    mine = [tmp_path / name for name in (".report.json.abc.tmp", ".report.json.ABCDEFGH.tmp", ".report.json.tmp")]
    for file in mine:
        file.write_text("mine")
    link = tmp_path / ".report.json.abcdefgh.tmp"
    link.symlink_to(mine[0])
    with whole_file(path) as written:
        written.write(b"half")
        held = [p for p in tmp_path.iterdir() if p not in mine and p != link]
        assert len(held) == 1
        remove_drafts(path)
        assert held[0].exists()
    assert path.read_bytes() == b"half"
    (tmp_path / ".report.json.00000000.tmp").write_text("left")
    atomic_write(path, b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, link, *mine])


def test_a_scratch_folder_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "upvits-work-00000000").mkdir()
    (tmp_path / "upvits-work-of-mine").mkdir()
    with scratch_folder() as first, scratch_folder() as second:
        assert first.is_dir()
        assert sorted(tmp_path.iterdir()) == sorted([first, second, tmp_path / "upvits-work-of-mine"])
    assert [path.name for path in tmp_path.iterdir()] == ["upvits-work-of-mine"]


def test_work_folders_of_stages_that_are_not_run_again_go_and_those_of_detectors_stay(tmp_path: Path) -> None:
    gone = [".1-score.work-0123456789abcdef", "5-engine/.tensorrt-fp16.work-0123456789abcdef", ".1-score.shared"]
    stay = ["7-detect/.dense.work-0123456789abcdef", ".2-prune.work-mine", ".mine.work-0123456789abcdef", "3-distill"]
    for name in (*gone, *stay):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "half").touch()
    (tmp_path / "elsewhere/.x.work-0123456789abcdef").mkdir(parents=True)
    (tmp_path / "run/4-export").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run/.6-bench.work-0123456789abcdef").symlink_to(tmp_path / "elsewhere")
    remove_work_folders(tmp_path / "run")
    assert not any((tmp_path / "run" / name).exists() for name in gone)
    assert all((tmp_path / "run" / name / "half").exists() for name in stay)
    assert (tmp_path / "elsewhere/.x.work-0123456789abcdef").exists()
