"""Image files are decoded once: what was found out is remembered, and anything that changes is noticed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upvits.calib_data import DataSource, open_data
from upvits.calib_data import labelled as labelled_module


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("UPVITS_DEPLOY_CACHE", str(folder))
    return folder


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded."""
    names: list[str] = []
    look = labelled_module._look

    def noted(path: str) -> object:
        names.append(os.path.basename(path))
        return look(path)

    monkeypatch.setattr(labelled_module, "_look", noted)
    return names


def age(*files: Path) -> None:
    for file in files:
        os.utime(file, (time.time() - 100,) * 2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six in each of two classes; one is of 12 bits."""
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            Image.effect_noise((20, 16), 60).save(root / name / f"{name}{number}.png")
    Image.fromarray(np.full((16, 16), 3000, np.uint16)).save(root / "dog" / "dog5.png")
    age(*root.rglob("*.png"))
    return root


def opened(root: Path, recheck: bool = False) -> DataSource:
    return open_data(f"imagefolder:{root}", recheck=recheck)


def same(one: DataSource, other: DataSource) -> bool:
    plain = [replace(source, train=source.train, val=source.val) for source in (one, other)]
    pixels = [[(i.tobytes(), label) for part in (s.train, s.val) for i, label in part] for s in (one, other)]
    fields = [(s.spec, s.class_names, s.digest, s.skipped, s.numbered_by_name, s.notes) for s in plain]
    return pixels[0] == pixels[1] and fields[0] == fields[1]


def test_second_opening_decodes_nothing_and_is_the_same(photos: Path, looked_at: list[str]) -> None:
    first = opened(photos)
    assert len(looked_at) == 12
    assert "12 bits" in first.notes[0]
    looked_at.clear()
    assert same(opened(photos), first)
    assert looked_at == []
    assert same(opened(photos, recheck=True), first)
    assert len(looked_at) == 12


def test_unreadable_file_is_remembered_as_such(photos: Path, looked_at: list[str]) -> None:
    for number in range(200):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / "cat" / f"more{number}.png")
    (photos / "cat" / "cat0.png").write_bytes(b"no picture")
    age(*photos.rglob("*.png"))
    first = opened(photos)
    assert first.skipped == (str(photos / "cat" / "cat0.png"),)
    looked_at.clear()
    assert same(opened(photos), first)
    assert looked_at == []


def rewritten(photos: Path) -> None:
    Image.new("RGB", (20, 16)).save(photos / "cat" / "cat1.png")


def repainted(photos: Path) -> None:
    """Another picture with the same time: the time of its status tells."""
    file = photos / "cat" / "cat1.png"
    status = file.stat()
    Image.new("RGB", (20, 16)).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def added(photos: Path) -> None:
    Image.new("RGB", (20, 16)).save(photos / "cat" / "cat1b.png")


@pytest.mark.parametrize(
    ("change", "names"), [(rewritten, {"cat1.png"}), (repainted, {"cat1.png"}), (added, {"cat1b.png"})]
)
def test_changed_file_alone_is_looked_at(
    photos: Path, looked_at: list[str], change: Callable[[Path], None], names: set[str]
) -> None:
    first = opened(photos)
    looked_at.clear()
    change(photos)
    second = opened(photos)
    assert set(looked_at) == names
    assert second.digest != first.digest
    assert same(second, opened(photos, recheck=True))


def test_removed_file_is_noticed(photos: Path, looked_at: list[str]) -> None:
    first = opened(photos)
    looked_at.clear()
    (photos / "cat" / "cat1.png").unlink()
    second = opened(photos)
    assert looked_at == []
    assert second.digest != first.digest
    assert len(second.train) + len(second.val) == 11


def test_file_that_was_just_written_is_not_believed(photos: Path, looked_at: list[str]) -> None:
    """Within one tick of the clock it could change without another time."""
    added(photos)
    opened(photos)
    looked_at.clear()
    opened(photos)
    assert looked_at == ["cat1b.png"]


def test_table_is_remembered_too(photos: Path, looked_at: list[str]) -> None:
    rows = [f"{file.relative_to(photos)},{file.parent.name}" for file in sorted(photos.rglob("*.png"))]
    (photos / "train.csv").write_text("\n".join(["file,label", *rows]))
    first = open_data(f"csv:{photos / 'train.csv'}")
    looked_at.clear()
    assert same(open_data(f"csv:{photos / 'train.csv'}"), first)
    assert looked_at == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"\0" * 100,
        lambda text: b"",
        lambda text: b"[" * 100_000,
        lambda text: text.replace(b'"format_version":1', b'"format_version":2'),
        lambda text: text.replace(b"Pillow", b"Pillar"),
        lambda text: text.replace(b" 0 0", b" 0 x"),
        lambda text: text.replace(b" 0 0", b" 0 1"),
        lambda text: b'{"format_version":1,"reader":"","files":[]}',
    ],
)
def test_damaged_or_foreign_memory_is_made_again(
    photos: Path, cache: Path, looked_at: list[str], damage: Callable[[bytes], bytes]
) -> None:
    first = opened(photos)
    (file,) = cache.rglob("*.json")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    looked_at.clear()
    assert same(opened(photos), first)
    assert len(looked_at) == 12
    assert file.read_bytes() == whole


def test_memory_of_another_machine_is_not_believed(photos: Path, looked_at: list[str], tmp_path: Path) -> None:
    """A home folder that machines share, and other files at the same path."""
    opened(photos)
    looked_at.clear()
    photos.rename(tmp_path / "elsewhere")
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for file in (tmp_path / "elsewhere" / name).iterdir():
            (photos / name / file.name).write_bytes(file.read_bytes())
    opened(photos)
    assert len(looked_at) == 12


def test_cache_that_cannot_be_written_is_no_error(
    photos: Path, cache: Path, looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    first = opened(photos)
    assert same(opened(photos), first)
    assert len(looked_at) == 24
    monkeypatch.delenv("UPVITS_DEPLOY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert same(opened(photos), first)


def test_two_processes_at_once_leave_one_whole_file(photos: Path, cache: Path, looked_at: list[str]) -> None:
    program = f"import upvits; print(upvits.open_data('imagefolder:{photos}').digest)"
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate()[0].strip() for process in both}
    assert digests == {opened(photos).digest}
    assert looked_at == []
    assert [file.suffix for file in cache.rglob("*") if file.is_file()] == [".json"]


def test_dead_link_among_files_that_are_not_checked_is_skipped(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / "cat" / f"more{number:03}.png")
    (photos / "cat" / "more000x.png").symlink_to(photos / "nowhere.png")
    monkeypatch.setattr(labelled_module, "FULL_CHECK_LIMIT", 10)
    assert opened(photos).skipped == (str(photos / "cat" / "more000x.png"),)
