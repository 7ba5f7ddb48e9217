"""Stages and their artifacts: what is whole is kept, what changed or broke is made again.

An artifact is a folder with a `manifest.json`. The stage works in a hidden sibling of that folder; the manifest is
written there last, and one rename brings the whole thing to its place. So a folder under its final name is always
complete, and being killed at any moment costs at most the stage that was running.

A stage is skipped when the key in the manifest equals the key of what is asked for, and every file has the size and
sha256 that the manifest names. The key is the sha256 of the canonical JSON of the stage's name and version, its
settings, and the digests of its inputs. For an engine the caller puts the library version and the device among the
inputs. When the settings changed, the old folder stays in place until the new one is whole.

Nothing of the user's is deleted: an old folder that holds a file its manifest does not list, or one with other bytes,
is set aside as `NAME.replaced-N` instead of being removed.

Work in progress lives in `.NAME.work-KEY`. A resumable stage (training with checkpoints) finds its own files there
after a kill and goes on, because the folder's name carries the key; other stages start from an empty folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict

from upvits.calib_data.documents import Count, Name, Number, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.paths import RelativePath, path_inside, share
from upvits.deploy.store.disk import disk_errors
from upvits.deploy.store.drafts import held, new_draft

MANIFEST = "manifest.json"
_RECORDED_PACKAGES = ("upvits-deploy", "torch", "timm", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
_SAMPLE_SECONDS = 0.05


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Document):
    """One file of an artifact: size in bytes and sha256 in hexadecimal."""

    sha256: Name
    bytes: Count


class Manifest(_Document):
    """What a stage made, from what, and what it took. `files` maps paths relative to the folder (with `/`).

    `seconds` is wall time and `peak_rss_mb` the largest resident memory of this process while the stage ran (1 MB =
    10**6 bytes, everything that was loaded before included), both for the attempt that finished the stage.
    """

    format_version: Literal[1] = 1
    stage: Name
    stage_version: Count
    key: Name
    settings: dict[Name, Any]
    inputs: dict[Name, Name]
    files: dict[RelativePath, FileEntry]
    created: Name
    seconds: Number
    peak_rss_mb: Number
    versions: dict[Name, Name]


class StageRecord(_Document):
    """One line of `stages[]` in report.json. A skipped stage keeps the figures of the run that made it."""

    name: Name
    seconds: Number
    peak_rss_mb: Number
    skipped: bool


@dataclass(frozen=True, slots=True)
class Artifact:
    """A whole stage folder. `skipped`: it existed already and nothing had to run."""

    folder: Path
    manifest: Manifest
    skipped: bool = False

    @property
    def digest(self) -> str:
        """Identifies the contents (not the key): the input digest for stages that use this artifact."""
        return canonical_digest({path: entry.sha256 for path, entry in self.manifest.files.items()})

    @property
    def record(self) -> StageRecord:
        """What report.json says about this stage."""
        manifest = self.manifest
        return StageRecord(
            name=manifest.stage, seconds=manifest.seconds, peak_rss_mb=manifest.peak_rss_mb, skipped=self.skipped
        )


def run_stage(
    run_dir: Path,
    name: str,
    settings: Mapping[str, object],
    inputs: Mapping[str, str],
    work: Callable[[Path], None],
    *,
    version: int = 1,
    resumable: bool = False,
) -> Artifact:
    """Return the artifact of a stage, running `work` only where it is missing, broken or made from something else.

    Args:
        run_dir: a run directory that the caller holds (see `deploy.store.run_dir.open_run`).
        name: folder of the stage below `run_dir`, for instance `1-score` or `5-engine/onnxruntime-fp32`.
        settings: everything that decides the result, as plain JSON values.
        inputs: digests by name: `artifact.digest`, `file_digest(...)`, and for engines library version and device.
        work: makes the stage's files in the empty folder that it is given. With `resumable` the folder may hold what
            a killed attempt with the same key left there, and `work` goes on from it.
        version: version of the stage's code; a new number makes every older artifact of the stage stale.
        resumable: keep the work folder when the attempt fails or is killed.

    Raises:
        UserError: the disk is full or the folder cannot be written. No half artifact stays.

    Example:
        >>> import tempfile
        >>> run_dir = Path(tempfile.mkdtemp())
        >>> def work(folder: Path) -> None:
        ...     atomic_write(folder / "answer.txt", b"42")
        >>> run_stage(run_dir, "1-think", {"question": "?"}, {}, work).skipped
        False
        >>> run_stage(run_dir, "1-think", {"question": "?"}, {}, work).skipped
        True
    """
    key = stage_key(name, version, settings, inputs)
    final = path_inside(run_dir, name)
    folder = final.with_name(f".{final.name}.work-{key[:16]}")
    with disk_errors(run_dir, name):
        if folder.is_symlink():  # nothing that this made, and what it leads to is not ours
            folder.unlink()
        for place, artifact in ((final, open_artifact(final)), (folder, open_artifact(folder))):
            if artifact is not None and artifact.manifest.key == key:
                if place == folder:  # killed between the last file and the rename
                    _put_in_place(folder, final)
                return Artifact(final, artifact.manifest, skipped=True)
        if not resumable:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_drafts(folder)
        try:
            started = time.perf_counter()
            with PeakMemory() as memory:
                work(folder)
            manifest = Manifest(
                stage=name,
                stage_version=version,
                key=key,
                settings=dict(settings),
                inputs=dict(inputs),
                files=_list_files(folder),
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - started, 3),
                peak_rss_mb=round(memory.peak_bytes / 1e6, 1),
                versions=package_versions(),
            )
            atomic_write(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
        except BaseException:
            if not resumable:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        _put_in_place(folder, final)
    return Artifact(final, manifest)


def _remove_drafts(folder: Path) -> None:
    """Remove what an attempt that was killed had not finished: hidden drafts, *.tmp, the manifest, links."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            path.unlink()
        elif path.name.startswith(".") and path.is_dir():
            shutil.rmtree(path)
        elif path.name.startswith(".") or path.suffix == ".tmp" or path == folder / MANIFEST:
            path.unlink(missing_ok=True)


def open_artifact(folder: Path) -> Artifact | None:
    """Return the artifact in `folder`, or None when it has no manifest or a file is missing, cut short or altered.

    Raises:
        UserError: a link leads out of the folder.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        return None
    for path, entry in manifest.files.items():
        if not _holds(path_inside(folder, path), entry):
            return None
    return Artifact(folder, manifest, skipped=True)


def _read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None where there is none that this version can read: the stage is done again."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return read_document(path, Manifest, fix="Delete this file: the stage is done again.")
    except UserError:
        return None


def has_final_name(folder: Path) -> bool:
    """Whether a stage's folder is in its place: neither in the making nor set aside for a newer one."""
    return not folder.name.startswith(".") and ".replaced-" not in folder.name


def stage_key(name: str, version: int, settings: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """Return the sha256 (hexadecimal) that decides whether an artifact still answers what is asked for."""
    return canonical_digest({"stage": name, "version": version, "settings": dict(settings), "inputs": dict(inputs)})


def canonical_digest(value: object) -> str:
    """Return the sha256 of a JSON value, independent of the order of keys and sensitive to everything else.

    Raises:
        TypeError: something in `value` has no exact JSON form (a non-string key, NaN, an object), and so no digest.
    """
    return hashlib.sha256(
        json.dumps(_checked(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hexadecimal) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to. Its path holds its old content until the context ends, and then all that was written."""
    descriptor, temporary = new_draft(path)
    try:
        with os.fdopen(descriptor, "wb") as file, held(temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            share(temporary)  # mkstemp's 0600 would lock out whoever shares the results
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that its path holds either the old content or all of `data`."""
    with whole_file(path) as file:
        file.write(data)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide results, by distribution name."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


class PeakMemory:
    """Context manager that finds the largest resident memory of this process while it is open, in bytes.

    A thread samples every 50 ms. Where the operating system keeps the process's high-water mark and it rose meanwhile,
    that exact figure wins, so that a short spike between two samples counts too.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._mark = 0

    def __enter__(self) -> PeakMemory:
        self._mark = _high_water_mark()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        mark = _high_water_mark()
        if mark > self._mark:
            self.peak_bytes = max(self.peak_bytes, mark)

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


def _high_water_mark() -> int:
    """Largest resident memory of this process so far in bytes, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024


def _checked(value: object) -> object:
    # json.dumps would quietly write {1: x} like {"1": x}, and two settings would share a key.
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"keys of settings must be strings: {sorted(map(repr, value))}")
        return {name: _checked(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_checked(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        raise TypeError(f"{value} has no JSON form")
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(f"{value!r} ({type(value).__name__}) has no JSON form")


def _list_files(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=file_digest(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _put_in_place(folder: Path, final: Path) -> None:
    """Bring a whole work folder to its final name, then drop what it replaces and other keys' work in progress."""
    if final.exists():
        # Killed right after this rename, the next run finds the whole work folder and finishes the job.
        final.rename(_free_name(final))
    folder.rename(final)
    for old in final.parent.glob(f"{final.name}.replaced-*"):
        if _is_ours_alone(old):
            shutil.rmtree(old)
    for stale in final.parent.glob(f".{final.name}.work-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _free_name(final: Path) -> Path:
    number = 1
    while (name := final.with_name(f"{final.name}.replaced-{number}")).exists():
        number += 1
    return name


def _is_ours_alone(folder: Path) -> bool:
    """Whether every file in a replaced folder is one that its manifest lists, with the bytes that it lists."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return False
    for path in folder.rglob("*"):
        entry = manifest.files.get(path.relative_to(folder).as_posix())
        if path.is_symlink() or (path != folder / MANIFEST and not path.is_dir() and not _holds(path, entry)):
            return False
    return True


def _holds(path: Path, entry: FileEntry | None) -> bool:
    """Whether a file is a regular one with these bytes."""
    return (
        entry is not None
        and path.is_file()
        and path.stat().st_size == entry.bytes
        and file_digest(path) == entry.sha256
    )
