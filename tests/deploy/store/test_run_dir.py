"""A directory belongs to one run, and to one process at a time."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upvits.calib_data.errors import UserError
from upvits.deploy.store.run_dir import RECIPE, open_run, read_recipe

IDENTITY = ("model", "weights", "ratio", "data")
RECIPE_OF_DEMO = {"model": "pvt_v2_b0", "weights": "demo", "ratio": 0.5, "data": "demo", "epochs": 3, "like": None}

HOLDER = """
import sys, time
from pathlib import Path
from upvits.deploy.store.run_dir import open_run
with open_run(Path(sys.argv[1]), {"model": "pvt_v2_b0", "weights": "demo", "ratio": 0.5, "data": "demo"}, ("model",)):
    print("holding", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(run_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the directory."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def open_and_close(run_dir: Path, **changes: object) -> None:
    with open_run(run_dir, {**RECIPE_OF_DEMO, **changes}, IDENTITY):
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_recipe_is_written_and_read_back(tmp_path: Path) -> None:
    open_and_close(tmp_path / "deep/run", sizes=(1, 8))
    expected = {name: value for name, value in RECIPE_OF_DEMO.items() if value is not None} | {"sizes": [1, 8]}
    assert read_recipe(tmp_path / "deep/run") == expected


VALUES = st.text(max_size=10) | st.integers(-(2**40), 2**40) | st.booleans() | st.floats(allow_nan=False)


@given(st.dictionaries(st.text(min_size=1, max_size=8), VALUES | st.lists(VALUES, max_size=3), max_size=5))
def test_any_recipe_continues_its_own_run(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, object]) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    for _ in range(2):
        with open_run(run_dir, recipe, list(recipe)):
            assert read_recipe(run_dir) == recipe


def test_other_settings_of_the_same_run_are_welcome(tmp_path: Path) -> None:
    open_and_close(tmp_path)
    open_and_close(tmp_path, epochs=10)
    assert read_recipe(tmp_path)["epochs"] == 10


@pytest.mark.parametrize("name", IDENTITY)
def test_the_directory_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    open_and_close(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"holds another run: {name} is") as error:
        open_and_close(tmp_path, **{name: "other"})
    assert "--output" in error.value.fix
    assert contents(tmp_path) == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and is not a run"):
        open_and_close(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_file_in_the_way_is_a_message(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"is a file"):
        open_and_close(tmp_path / "file" / below)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("name", [RECIPE, ".lock.json"])
def test_a_folder_in_place_of_a_file_is_a_message_and_moving_it_away_helps(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    with open_run(run, RECIPE_OF_DEMO, IDENTITY):
        pass
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}"), open_run(run, RECIPE_OF_DEMO, IDENTITY):
        pass
    (run / name).rmdir()
    with open_run(run, RECIPE_OF_DEMO, IDENTITY):
        pass


def test_a_folder_that_nobody_can_write_is_a_message() -> None:
    with pytest.raises(UserError, match="cannot write to the output folder"):
        open_and_close(Path("/proc/run"))


def test_a_broken_recipe_is_a_message(tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text("model = ")
    with pytest.raises(UserError, match="cannot read"):
        open_and_close(tmp_path)


def test_reading_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        read_recipe(tmp_path)


def test_a_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        before = contents(tmp_path)
        with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
            open_and_close(tmp_path)
        assert contents(tmp_path) == before


def test_a_second_opening_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path, RECIPE_OF_DEMO, IDENTITY), pytest.raises(UserError, match=f"process {os.getpid()}"):
        open_and_close(tmp_path)


def test_a_killed_holder_does_not_block_the_directory(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        open_and_close(tmp_path)
    assert not (tmp_path / ".lock.json").exists()


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage"), open_run(tmp_path, RECIPE_OF_DEMO, IDENTITY):
        raise ValueError("stage")
    open_and_close(tmp_path)


@pytest.mark.parametrize("name", [".lock", ".lock.json", RECIPE])
def test_links_in_a_run_are_not_written_through(tmp_path: Path, name: str) -> None:
    open_and_close(tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_bytes((tmp_path / "run" / RECIPE).read_bytes())
    before = victim.read_bytes()
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(victim)
    open_and_close(tmp_path / "run", epochs=9)
    assert victim.read_bytes() == before
