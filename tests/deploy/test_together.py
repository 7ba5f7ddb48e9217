"""The main job in two processes: one terminal, the result of one process, also when the second one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.forked import exit_codes, start_command
from upvits import toolchain

LOST, STOPPED = 75, 76


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small ViT on small pictures of two classes."""
    folder = tmp_path_factory.mktemp("job")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("val", 9)):
        for number, name in enumerate(("a", "b")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 128, (32, 32, 3), generator=generator) + 100 * number
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / "photos" / split / name / f"{index}.png")
    torch.manual_seed(0)
    model = toolchain.create_model("deit_tiny", weights="random", num_classes=2, image_size=32, model_args={"depth": 4})
    save_file(model.state_dict(), folder / "w.safetensors")
    return [
        "-m", "deit_tiny", "-r", "0.5", "--weights", str(folder / "w.safetensors"), "--data",
        f"imagefolder:{folder / 'photos'}", "--image-size", "32", "--model-arg", "depth=4", "--epochs", "2",
        "--batch-size", "8", "--checkpoint-minutes", "0", "--allow-weak", "--device", "cpu",
    ]  # fmt: skip


def start(command: list[str], out: Path, processes: int = 2, port: int = 0, last: str = "") -> list[BaseProcess]:
    """Processes of one job; what each prints goes to a file of its own.

    Args:
        port: where they meet; 0: a free one.
        last: an argument that only the last of them gets.
    """
    out.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start_command(
            [*command, last] if last and rank == processes - 1 else command,
            out / f"{rank}.txt",
            {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


def kill_second_when(path: str, command: list[str], out: Path, run_dir: Path) -> None:
    """Start, wait for a path in the run, kill -9 the second process: both end soon, with one message."""
    for old in out.glob("*.txt"):
        old.unlink()
    both = start(command, out)
    deadline = time.monotonic() + 300
    while not list(run_dir.glob(path)) and both[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert both[1].pid is not None
    os.kill(both[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert exit_codes(both) == [LOST, -signal.SIGKILL], (out / "0.txt").read_text()
    assert time.monotonic() - killed < 30
    assert (out / "0.txt").read_text().count("Error:") == 1
    assert "Process 1 of 2 ended before the work was done." in (out / "0.txt").read_text()
    assert (out / "1.txt").read_text() == ""


def signal_both_when(words: str, command: list[str], out: Path) -> None:
    """Start, wait for words on the terminal, send SIGUSR1 to both as slurm does: both end with the same code."""
    (out / "0.txt").unlink()
    both = start(command, out)
    deadline = time.monotonic() + 300
    while not (out / "0.txt").exists() or (words not in (out / "0.txt").read_text() and time.monotonic() < deadline):
        time.sleep(0.01)
    for process in both:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    assert exit_codes(both) == [STOPPED, STOPPED], (out / "0.txt").read_text()
    assert (out / "0.txt").read_text().count("Error:") <= 1  # none where training had not begun
    assert (out / "1.txt").read_text() == ""


@pytest.mark.slow
def test_two_processes_and_the_death_of_one(arguments: list[str], tmp_path: Path) -> None:
    straight, killed, alone = (["distill", *arguments, "-o", str(tmp_path / name)] for name in ("2", "killed", "1"))
    assert exit_codes(start(straight, tmp_path / "out")) == [0, 0], (tmp_path / "out/0.txt").read_text()
    assert (tmp_path / "out/1.txt").read_text() == ""
    assert (tmp_path / "out/0.txt").read_text().count("3-distill") == 1
    for place in (".1-score.work-*", ".2-prune.work-*", ".3-distill.work-*/checkpoint.safetensors"):
        kill_second_when(place, killed, tmp_path / "out", tmp_path / "killed")
    signal_both_when("2-prune: as before", killed, tmp_path / "out")
    assert exit_codes(start(killed, tmp_path / "out")) == [0, 0], (tmp_path / "out/0.txt").read_text()
    weights = [(tmp_path / name / "3-distill/model/model.safetensors").read_bytes() for name in ("2", "killed")]
    assert weights[0] == weights[1]
    assert exit_codes(start(alone, tmp_path / "out", processes=1)) == [0]
    plans = [json.loads((tmp_path / name / "2-prune/plan.json").read_text())["keep"] for name in ("2", "1")]
    assert plans[0] == plans[1]
    scores = [load_file(next((tmp_path / name / "1-score").glob("*.safetensors"))) for name in ("2", "1")]
    for name, values in scores[1].items():
        assert torch.allclose(scores[0][name], values, rtol=1e-6, atol=1e-6 * float(values.abs().max())), name


def refused(started: list[BaseProcess], out: Path, words: str) -> None:
    """All end with exit code 2, the first one says why, and soon."""
    assert exit_codes(started, seconds=120) == [2] * len(started), (out / "0.txt").read_text()
    said = (out / "0.txt").read_text()
    assert said.count("Error:") == 1
    assert words in " ".join(said.split())
    assert [(out / f"{rank}.txt").read_text() for rank in range(1, len(started))] == [""] * (len(started) - 1)


def test_a_refused_request_is_one_message(arguments: list[str], tmp_path: Path) -> None:
    command = ["distill", *arguments, "--batch-size", "9", "-o", str(tmp_path / "run")]
    refused(start(command, tmp_path), tmp_path, "9 images cannot be shared evenly by 2 processes")
    assert not (tmp_path / "run").exists()


def test_processes_with_different_commands_are_refused(arguments: list[str], tmp_path: Path) -> None:
    command = ["distill", *arguments, "-o", str(tmp_path / "run")]
    refused(start(command, tmp_path, last="--no-compensate"), tmp_path, "Process 1 was started with `distill")
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_program_has_ends_all(arguments: list[str], tmp_path: Path) -> None:
    """It takes connections and says nothing: waiting for an answer would take as long as waiting for late processes."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        command = ["distill", *arguments, "-o", str(tmp_path / "run")]
        started = start(command, tmp_path, port=other.getsockname()[1])
        refused(started, tmp_path, "The processes of this job cannot meet at 127.0.0.1")
    assert not (tmp_path / "run").exists()
