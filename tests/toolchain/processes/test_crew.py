"""Two processes give what one gives, and all end with one message when one of them does."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests import forked
from tests.forked import exit_codes
from tests.toolchain.processes import workers
from tests.toolchain.processes.workers import cut, scored, start
from upvits.calib_data.errors import LostProcessError, UserError
from upvits.toolchain.processes.launchers import number_of_processes, set_places

LOST = LostProcessError.exit_code


def said(folder: Path) -> str:
    """What all processes printed."""
    return "".join(path.read_text() for path in sorted(folder.glob("*.txt")))


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    assert exit_codes(start(workers.score_and_cut, tmp_path)) == [0, 0], said(tmp_path)
    assert said(tmp_path) == ""
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = {
        "fisher": scored("vit", "fisher", 20),
        "refined": scored("vit", "refined", 4),
        "kl": scored("pvt", "kl", 4),
        "vit": cut("vit", 4),
        "pvt": cut("pvt", 20),
    }
    for kind, values in alone.items():
        assert found[kind].keys() == values.keys()
        for name, value in values.items():
            scale = max(float(value.abs().max()), 1e-9)  # some losses of an untrained network are rounding alone
            allowed = 1e-6 if kind in ("fisher", "refined", "kl") else 1e-3  # solved from sums that round otherwise
            assert float((found[kind][name] - value).abs().max()) <= allowed * scale, (kind, name)


def test_an_error_of_all_may_be_caught_and_waiting_costs_nothing(tmp_path: Path) -> None:
    assert exit_codes(start(workers.fail_alike_and_go_on, tmp_path)) == [0, 0], said(tmp_path)
    assert float((tmp_path / "idle").read_text()) < 0.5  # processor seconds in four


def messages(folder: Path) -> int:
    return sum(line.startswith("Error: ") for line in said(folder).splitlines())


@pytest.mark.parametrize(
    ("lead", "codes", "message"),
    [
        (workers.be_refused, [2, 2], "Error: No such network."),
        (workers.refuse_second, [2, 2], "Error: Process 1: The disk of this machine is full.\nMake room."),
        (workers.break_second, [1, 1], "Error: process 1: KeyError: 'a fault of ours'"),
        (workers.kill_second, [LOST, -signal.SIGKILL], "Error: Process 1 of 2 ended before the work was done."),
        (workers.kill_first, [-signal.SIGKILL, LOST], "Error: Process 0 of 2 ended before the work was done."),
    ],
)
def test_all_end_with_one_message(lead, codes, message, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    started = time.monotonic()
    assert exit_codes(start(lead, tmp_path)) == codes, said(tmp_path)
    assert messages(tmp_path) == 1
    assert message in said(tmp_path)
    assert time.monotonic() - started < 60


def test_one_of_three_dies(tmp_path: Path) -> None:
    codes = exit_codes(start(workers.kill_second, tmp_path, processes=3))
    assert codes == [LOST, -signal.SIGKILL, LOST], said(tmp_path)
    assert messages(tmp_path) == 1


def test_processes_that_torchrun_starts_again_do_not_look_for_the_dead_ones(tmp_path: Path) -> None:
    """It keeps its store, and with it the addresses that the dead processes had."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    codes = exit_codes(start(workers.kill_second, tmp_path, more={**agent, "TORCHELASTIC_RESTART_COUNT": "0"}))
    assert codes == [LOST, -signal.SIGKILL], said(tmp_path)
    again = start(workers.fail_alike_and_go_on, tmp_path, more={**agent, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert exit_codes(again, seconds=120) == [0, 0], said(tmp_path)


def test_a_program_that_torchrun_started_may_train_twice(tmp_path: Path) -> None:
    """Its store still has the addresses of the first group."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [forked.start(workers.meet_twice, rank, agent, tmp_path) for rank in range(2)]
    codes = exit_codes(started, seconds=60)
    for process in started:
        process.kill()
    assert codes == [0, 0], said(tmp_path)
    assert [(tmp_path / f"sums-{rank}").read_text() for rank in range(2)] == ["3.0 3.0"] * 2


@pytest.mark.parametrize("said", ["abc", "0", "-1", "1.5", "\u00b2", "9" * 5000])
def test_a_number_of_processes_that_is_none_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(UserError, match="WORLD_SIZE is"):
        number_of_processes()


def test_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what `set_places` sets is undone after the test
        monkeypatch.delenv(name)
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    for name, value in batch.items():
        monkeypatch.setenv(name, value)
    assert number_of_processes() == 1  # the script of sbatch, whatever it reserved
    step = {
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert number_of_processes() == 8
    set_places()
    places = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert places == ["5", "8", "1", "127.0.0.1", str(20_000 + 4711 + 2 * 997)]
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun below srun counts
    monkeypatch.setenv("RANK", "1")
    set_places()
    assert number_of_processes() == 2
    assert os.environ["RANK"] == "1"
