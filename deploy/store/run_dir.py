"""The directory of a run: one recipe, one owner at a time.

`recipe.toml` says which run a directory belongs to. A directory that holds another run, or something that is no run,
is refused before anything is written there. A lock keeps two processes out of one directory; the operating system
releases it when its holder ends, however it ends.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout
from pydantic import BaseModel

from upvits.calib_data.documents import Count, Name, read_document, read_regular, require_plain
from upvits.calib_data.errors import UserError
from upvits.calib_data.printable import printable
from upvits.deploy.store.artifacts import atomic_write
from upvits.deploy.store.disk import disk_full_error, folder_in_the_way, is_disk_full, unwritable_error
from upvits.deploy.store.drafts import drafts_of, remove_drafts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE = "recipe.toml"
_LOCK = ".lock"
_REPORTS = ("report.json", "report.md", "report.html")
_HOLDER = ".lock.json"
_LARGEST_RECIPE = 4 << 20
_NO_RECIPE = "Repair or restore the file, or give another one."


@contextmanager
def open_run(run_dir: Path, recipe: Mapping[str, Any], identity: Sequence[str]) -> Iterator[Path]:
    """Create or continue a run and keep other processes out of its directory while the context is open.

    Args:
        run_dir: missing, empty, or the directory of the same run.
        recipe: the resolved recipe as plain values; written to `recipe.toml` (entries that are None are left out).
        identity: names of the recipe's entries that make it this run and no other (model, weights, ratio, data).
            Other settings may change between two commands; the stages that depend on them run again.

    Raises:
        UserError: the directory belongs to another run or is no run, another process works in it, it cannot be
            written, or the disk is full. Nothing is written in the first two cases.
    """
    values = _plain(recipe)
    _refuse_foreign(run_dir, values, identity)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / _LOCK).is_symlink():  # opening it would empty what it leads to
            (run_dir / _LOCK).unlink()
        lock = FileLock(run_dir / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise _busy(run_dir) from None
    except OSError as error:
        raise _cannot_open(run_dir, error) from error
    try:
        _refuse_foreign(run_dir, values, identity)  # again: another process may have started a run here meanwhile
        try:
            for name in _REPORTS:
                remove_drafts(run_dir / name)
            holder = _Holder(pid=os.getpid(), host=socket.gethostname())
            atomic_write(run_dir / _HOLDER, holder.model_dump_json().encode())
            atomic_write(run_dir / RECIPE, recipe_toml(values).encode())
        except OSError as error:
            raise _cannot_open(run_dir, error) from error
        yield run_dir
    finally:
        with suppress(OSError):  # absent, or a folder, which was said already
            (run_dir / _HOLDER).unlink()
        lock.release()


def recipe_toml(recipe: Mapping[str, Any]) -> str:
    """A recipe as TOML; entries that are None are left out."""
    return tomli_w.dumps(_plain(recipe))


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """Return the recipe of a run directory as plain values.

    Raises:
        UserError: the folder has no `recipe.toml`, or it cannot be read.
    """
    if not (run_dir / RECIPE).is_file():
        raise UserError(
            f"{run_dir} is not a run directory.",
            why=f"It has no {RECIPE}.",
            fix="Name the folder that `upvits-deploy build` wrote (by default below runs/).",
        )
    return read_toml(run_dir / RECIPE)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a recipe file.

    Raises:
        UserError: it cannot be read, or is no TOML.
    """
    try:
        values = tomllib.loads(read_regular(path, fix=_NO_RECIPE, largest=_LARGEST_RECIPE).decode("utf-8-sig"))
        require_plain(values)
        return values
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, too many digits; lists in lists in lists
        raise UserError(
            f"cannot read the recipe {path}: {printable(str(error), 300)}.",
            why="A recipe is a TOML file, such as the recipe.toml of a run.",
            fix=_NO_RECIPE,
        ) from error


def _refuse_foreign(run_dir: Path, values: Mapping[str, Any], identity: Sequence[str]) -> None:
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(
            f"the output {run_dir} is a file.",
            why="A run is written to a folder.",
            fix="Choose another place with --output.",
        )
    if not (run_dir / RECIPE).exists():
        ours = {run_dir / _LOCK, run_dir / _HOLDER, *drafts_of(run_dir / _HOLDER), *drafts_of(run_dir / RECIPE)}
        if not ours.issuperset(_entries(run_dir)):
            raise UserError(
                f"the output folder {run_dir} is not empty and is not a run.",
                why=f"It has files but no {RECIPE}; writing there could overwrite something of yours.",
                fix="Choose an empty or new folder with --output.",
            )
        return
    present = read_recipe(run_dir)
    differing = [name for name in identity if present.get(name) != values.get(name)]
    if differing:
        raise UserError(
            f"{run_dir} holds another run: "
            + "; ".join(
                f"{name} is {present.get(name)!r} in that run, {values.get(name)!r} in this command"
                for name in differing
            )
            + ".",
            why="Continuing would replace its results.",
            fix="Choose another folder with --output, or repeat the command with that run's settings.",
        )


class _Holder(BaseModel):
    """`.lock.json`: which process has the run."""

    pid: Count
    host: Name


def _entries(run_dir: Path) -> list[Path]:
    try:
        return list(run_dir.iterdir())
    except OSError as error:
        raise unwritable_error(run_dir, error) from error


def _busy(run_dir: Path) -> UserError:
    try:
        holder = read_document(run_dir / _HOLDER, _Holder, fix="")
        who = f"process {holder.pid} on {holder.host}"
    except UserError:  # it holds the lock, but has not said its name yet
        who = "another process"
    return UserError(
        f"{run_dir} is in use by {who}.",
        why="Two runs in one directory would mix their results.",
        fix="Wait until it ends (or end it), or choose another folder with --output.",
    )


def _cannot_open(run_dir: Path, error: OSError) -> UserError:
    if is_disk_full(error):
        return disk_full_error(run_dir, "the run could not start")
    if isinstance(error, IsADirectoryError):
        return folder_in_the_way(error)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        error = OSError(errno.ENOTDIR, "a part of the path is a file")
    return unwritable_error(run_dir, error)


def _plain(value: Any) -> Any:
    """The value as TOML can hold it: no None, lists for tuples."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
